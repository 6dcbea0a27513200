"""InternViT, the vision encoder of InternVL: the 300M flavour (layer norm) and the 6B flavour (RMS norm, qk norm).

Parameters carry the names of the original `modeling_intern_vit.py`. It deliberately has no final norm, no head and no
pooling beyond the class token: those belong to the models built on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available, logging

from .configuration_intern_vit import InternVisionConfig

logger = logging.get_logger(__name__)

# Published configurations say initializer_range 1e-10: a fresh or partly missing encoder would be dead.
_SMALLEST_INITIALIZER_RANGE = 1e-4
_FALLBACK_INITIALIZER_RANGE = 0.02


class InternRMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32, returned in the input's dtype."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = hidden_states.float()
        normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * normed.to(hidden_states.dtype)).to(hidden_states.dtype)


class InternLayerNorm(nn.LayerNorm):
    """Layer norm that runs in float32 where its weights and input differ in dtype (fp16 keeps norms in float32)."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype == self.weight.dtype:
            return super().forward(hidden_states)
        weight, bias = self.weight.float(), self.bias.float()
        normed = F.layer_norm(hidden_states.float(), self.normalized_shape, weight, bias, self.eps)
        return normed.to(hidden_states.dtype)


NORMS: dict[str, type[nn.Module]] = {"rms_norm": InternRMSNorm, "layer_norm": InternLayerNorm}


class InternDropPath(nn.Module):
    """Stochastic depth: drops a residual branch per sample with probability `rate` and rescales the survivors."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if self.rate == 0.0 or not self.training:
            return branch
        keep = 1.0 - self.rate
        mask = branch.new_empty((branch.shape[0],) + (1,) * (branch.ndim - 1)).bernoulli_(keep)
        return branch * mask / keep if keep > 0 else branch * mask

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention over (B, heads, L, head_dim); returns (B, L, heads, head_dim) and the probabilities."""
    weights = (query * scaling) @ key.transpose(-2, -1)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def resize_position_table(table: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resizes a position table to another grid: bicubic, in float32; the class row and the dtype stay.

    Args:
        table: (1, 1 + side**2, D), class row first, patches row by row.
        height, width: Wanted grid, in patches.

    Returns:
        (1, 1 + height * width, D); `table` itself where the grid is the same.
    """
    side = round((table.shape[1] - 1) ** 0.5)
    if (height, width) == (side, side):
        return table
    grid = table[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
    grid = grid.flatten(2).transpose(1, 2).to(table.dtype)
    return torch.cat([table[:, :1], grid], dim=1)


class InternVisionEmbeddings(nn.Module):
    """Patch embedding, class token and a learned position table that is resized bicubically to other grids."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_size = config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        positions = (config.image_size // config.patch_size) ** 2 + 1
        self.position_embedding = nn.Parameter(torch.zeros(1, positions, config.hidden_size))

    def resized_positions(self, height: int, width: int) -> torch.Tensor:
        """The position table for a grid of `height` x `width` patches: (1, 1 + height * width, D)."""
        return resize_position_table(self.position_embedding, height, width)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        batch, _, height, width = patches.shape
        patches = patches.flatten(2).transpose(1, 2)
        class_token = self.class_embedding.expand(batch, 1, -1).to(patches.dtype)
        embeddings = torch.cat([class_token, patches], dim=1)
        return embeddings + self.resized_positions(height, width).to(patches.dtype)


class InternVisionAttention(nn.Module):
    """Self-attention with one fused projection; the 6B flavour RMS-normalises q and k over the whole width."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.proj_drop = nn.Dropout(config.dropout)
        if config.qk_normalization:
            self.q_norm = InternRMSNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.k_norm = InternRMSNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch, length, width = hidden_states.shape
        query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)
        if self.config.qk_normalization:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (
            x.reshape(batch, length, self.num_heads, self.head_dim).transpose(1, 2) for x in (query, key, value)
        )
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, _ = attention(
            self,
            query,
            key,
            value,
            None,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            is_causal=False,
        )
        return self.proj_drop(self.proj(output.reshape(batch, length, width)))


class InternVisionMLP(nn.Module):
    """Two linear layers around the configured activation."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.act = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(hidden_states)))


class InternVisionEncoderLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer with layer scale and stochastic depth."""

    def __init__(self, config: InternVisionConfig, drop_path_rate: float) -> None:
        super().__init__()
        norm = NORMS[config.norm_type]
        self.attn = InternVisionAttention(config)
        self.mlp = InternVisionMLP(config)
        self.norm1 = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm2 = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.ls1 = nn.Parameter(config.initializer_factor * torch.ones(config.hidden_size))
        self.ls2 = nn.Parameter(config.initializer_factor * torch.ones(config.hidden_size))
        self.drop_path1 = InternDropPath(drop_path_rate)
        self.drop_path2 = InternDropPath(drop_path_rate)

    def _branch(
        self, hidden_states: torch.Tensor, norm: nn.Module, body: nn.Module, scale: nn.Parameter
    ) -> torch.Tensor:
        # Under fp16 the residual stream stays in float32 while the branches compute in fp16.
        output = body(norm(hidden_states).to(scale.dtype))
        return output.to(hidden_states.dtype) * scale.to(hidden_states.dtype)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        attended = self._branch(hidden_states, self.norm1, self.attn, self.ls1)
        hidden_states = hidden_states + self.drop_path1(attended)
        transformed = self._branch(hidden_states, self.norm2, self.mlp, self.ls2)
        return hidden_states + self.drop_path2(transformed)


def drop_path_rates(rate: float, layers: int) -> list[float]:
    """Stochastic-depth rates from 0 to `rate`, linear; plain floats, since models are built on the meta device."""
    return [rate * i / max(layers - 1, 1) for i in range(layers)]


class InternVisionEncoder(nn.Module):
    """The stack of encoder layers."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.config = config
        rates = drop_path_rates(config.drop_path_rate, config.num_hidden_layers)
        self.layers = nn.ModuleList(InternVisionEncoderLayer(config, rate) for rate in rates)

    def forward(self, inputs_embeds: torch.Tensor, output_hidden_states: bool = False) -> BaseModelOutput:
        """Runs the layers; with `output_hidden_states` also returns the input and the output of each of them."""
        hidden_states, states = inputs_embeds, [inputs_embeds]
        for layer in self.layers:
            hidden_states = layer(hidden_states)
            if output_hidden_states:
                states.append(hidden_states)
        return BaseModelOutput(
            last_hidden_state=hidden_states, hidden_states=tuple(states) if output_hidden_states else None
        )


class InternVisionModel(PreTrainedModel):
    """InternViT encoder (InternVL 1.5 report, arXiv 2404.16821, section 3; original `modeling_intern_vit.py`).

    Attention runs through transformers' interface (`sdpa` by default, `eager`, `flash_attention_2`, `flex_attention`).
    In float16 the norms and the residual stream are kept in float32, because the activations of the 6B encoder can
    leave float16's range.

    `from_pretrained` takes a released encoder or a whole InternVL checkpoint, of which it loads `vision_model.*`;
    transformers then reports the other weights as unexpected.

    Args:
        config: The configuration.
        use_flash_attn: As existing scripts pass it: True asks for FlashAttention 2 and, where it is not available,
            says so and uses SDPA.
    """

    config_class = InternVisionConfig
    config: InternVisionConfig
    base_model_prefix = "vision_model"  # its name in whole checkpoints
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["InternVisionEncoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules = ["norm1", "norm2", "q_norm", "k_norm"]

    def __init__(self, config: InternVisionConfig, use_flash_attn: bool | None = None) -> None:
        if use_flash_attn:
            request_flash_attention(config)
        super().__init__(config)
        self.embeddings = InternVisionEmbeddings(config)
        self.encoder = InternVisionEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding, as in transformers' own vision models."""
        return self.embeddings.patch_embedding

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        std = std if std >= _SMALLEST_INITIALIZER_RANGE else _FALLBACK_INITIALIZER_RANGE
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (nn.LayerNorm, InternRMSNorm)):
            init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, InternVisionEmbeddings):
            init.normal_(module.class_embedding, mean=0.0, std=std)
            init.normal_(module.position_embedding, mean=0.0, std=std)
        elif isinstance(module, InternVisionEncoderLayer):
            init.constant_(module.ls1, self.config.initializer_factor)
            init.constant_(module.ls2, self.config.initializer_factor)

    @torch.no_grad()
    def resize_pos_embeddings(self, old_size: int, new_size: int, patch_size: int) -> None:
        """Resizes the stored position table to tiles of `new_size` pixels (name and arguments as in the original).

        Args:
            old_size: Tile side in pixels that the table was made for.
            new_size: Wanted tile side in pixels, a multiple of `patch_size`.
            patch_size: Patch side in pixels.

        Raises:
            ValueError: the sizes do not fit the table.
        """
        stored = round((self.embeddings.position_embedding.shape[1] - 1) ** 0.5)
        if old_size // patch_size != stored or new_size % patch_size:
            raise ValueError(
                f"The table holds {stored}x{stored} patches: old_size {old_size} must equal {stored} * patch_size "
                f"({patch_size}) and new_size {new_size} must be a multiple of it."
            )
        side = new_size // patch_size
        self.embeddings.position_embedding = nn.Parameter(self.embeddings.resized_positions(side, side).clone())
        self.config.image_size = new_size

    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        pixel_embeds: torch.FloatTensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """Encodes tiles.

        Args:
            pixel_values: (tiles, 3, H, W), normalised; H and W multiples of the patch size. Sizes other than the
                configured one interpolate the position table.
            output_hidden_states: Also return the embeddings and every layer's output (index 0 = embeddings).
            return_dict: False for a plain tuple.
            pixel_embeds: (tiles, 1 + patches, D) already embedded tiles, instead of `pixel_values`.

        Returns:
            `last_hidden_state` (tiles, 1 + patches, D), class token first; `pooler_output` (tiles, D), that token.

        Raises:
            ValueError: neither or both inputs, or pixels of the wrong rank or size.
        """
        if (pixel_values is None) == (pixel_embeds is None):
            raise ValueError("Pass either pixel_values or pixel_embeds to InternVisionModel.")
        if pixel_embeds is None:
            self._check_pixels(pixel_values)
            pixel_embeds = self.embeddings(pixel_values)
        wanted = output_hidden_states if output_hidden_states is not None else self.config.output_hidden_states
        dtype = pixel_embeds.dtype
        stream = pixel_embeds.float() if dtype == torch.float16 else pixel_embeds
        outputs = self.encoder(stream, output_hidden_states=bool(wanted))
        last = _to_dtype(outputs.last_hidden_state, dtype)
        states = outputs.hidden_states and tuple(_to_dtype(state, dtype) for state in outputs.hidden_states)
        result = BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=last[:, 0], hidden_states=states)
        return result if return_dict in (None, True) else result.to_tuple()

    def _check_pixels(self, pixel_values: torch.Tensor) -> None:
        patch = self.config.patch_size
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != self.config.num_channels or shape[2] % patch or shape[3] % patch:
            raise ValueError(
                f"pixel_values has shape {shape}; expected (tiles, {self.config.num_channels}, H, W) with H and W "
                f"multiples of the patch size {patch}. Make it with InternVLImageProcessor."
            )


def request_flash_attention(config: PretrainedConfig) -> None:
    """Asks for FlashAttention 2 in a configuration and its parts; says so and leaves SDPA where it is not usable."""
    if is_flash_attn_2_available():
        config._attn_implementation = "flash_attention_2"
    else:
        logger.warning("use_flash_attn=True, but flash-attn is not usable here: using PyTorch's SDPA attention.")


def _to_dtype(hidden_states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Back to the model's dtype; in float16 values beyond its range saturate instead of becoming infinite."""
    if dtype == torch.float16:
        limit = torch.finfo(dtype).max
        hidden_states = hidden_states.clamp(-limit, limit)
    return hidden_states.to(dtype)


InternVisionModel.register_for_auto_class("AutoModel")
