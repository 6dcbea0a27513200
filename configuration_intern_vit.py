"""Configuration of InternViT, the vision encoder of InternVL (300M and 6B flavours).

It describes the encoder alone; tiling, the projector and the language model belong to `InternVLChatConfig`.
"""

from __future__ import annotations

import os
from typing import Any

from transformers import PretrainedConfig

# Left over in released files from experiments; no published encoder uses them (all InternVL3 configs carry them).
_DEAD_PREFIXES = ("moe_", "laux_")
_DEAD_KEYS = frozenset(
    "attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal "
    "_name_or_path capacity_factor ep_size eval_capacity_factor noisy_gate_policy num_experts num_routed_experts "
    "num_shared_experts shared_expert_intermediate_size use_ema use_flash_attn use_moe use_residual use_rts "
    "use_weighted_residual".split()
)


def drop_dead_vision_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Returns `values` without the keys of released `vision_config`s that no published encoder reads."""
    return {k: v for k, v in values.items() if k not in _DEAD_KEYS and not k.startswith(_DEAD_PREFIXES)}


class InternVisionConfig(PretrainedConfig):
    """Configuration of `InternVisionModel`.

    The defaults are those of the first release (InternViT-6B-224px, 48 layers), as in the original file
    `configuration_intern_vit.py`; released checkpoints write every field.

    Args:
        num_channels: Input channels.
        patch_size: Side of a square patch, in pixels.
        image_size: Side of a square tile, in pixels; the position table has `1 + (image_size // patch_size)**2` rows.
        qkv_bias: Whether query, key and value projections have a bias (300M: yes, 6B: no).
        hidden_size: Width D.
        num_attention_heads: Heads; must divide `hidden_size`.
        intermediate_size: Width of the MLP.
        qk_normalization: RMS-normalise queries and keys over the whole width, before the split into heads (6B).
        num_hidden_layers: Encoder layers.
        hidden_act: Activation of the MLP.
        norm_type: `"rms_norm"` (6B) or `"layer_norm"` (300M).
        layer_norm_eps: Epsilon of every norm.
        dropout: Dropout after the attention projection.
        drop_path_rate: Stochastic depth of the last layer; it grows linearly from 0.
        attention_dropout: Dropout of attention probabilities.
        initializer_range: Standard deviation of fresh weights. Published files say `1e-10`, which would give a dead
            network; `InternVisionModel` then uses 0.02.
        initializer_factor: Initial value of the layer-scale vectors.
    """

    model_type = "intern_vit_6b"
    base_config_key = "vision_config"

    def __init__(
        self,
        num_channels: int = 3,
        patch_size: int = 14,
        image_size: int = 224,
        qkv_bias: bool = False,
        hidden_size: int = 3200,
        num_attention_heads: int = 25,
        intermediate_size: int = 12800,
        qk_normalization: bool = True,
        num_hidden_layers: int = 48,
        hidden_act: str = "gelu",
        norm_type: str = "rms_norm",
        layer_norm_eps: float = 1e-6,
        dropout: float = 0.0,
        drop_path_rate: float = 0.0,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        initializer_factor: float = 0.1,
        **kwargs: Any,
    ) -> None:
        if norm_type not in ("rms_norm", "layer_norm"):
            raise ValueError(f"norm_type must be 'rms_norm' or 'layer_norm', got {norm_type!r}.")
        if num_attention_heads < 1 or hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size {hidden_size} is not divisible by num_attention_heads {num_attention_heads}."
            )
        self.num_channels = num_channels
        self.patch_size = patch_size
        self.image_size = image_size
        self.qkv_bias = qkv_bias
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.qk_normalization = qk_normalization
        self.num_hidden_layers = num_hidden_layers
        self.hidden_act = hidden_act
        self.norm_type = norm_type
        self.layer_norm_eps = layer_norm_eps
        self.dropout = dropout
        self.drop_path_rate = drop_path_rate
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.initializer_factor = initializer_factor
        attention = kwargs.get("attn_implementation")  # a caller's wish survives, a saved leftover is dropped below
        kwargs = drop_dead_vision_keys(kwargs)
        super().__init__(**kwargs, **({"attn_implementation": attention} if attention is not None else {}))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> InternVisionConfig:
        """Also accepts a full InternVL checkpoint, of which it takes the `vision_config`.

        Raises:
            ValueError: the encoder is of another kind, such as that of transformers' own InternVL layout.
        """
        config_dict, kwargs = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        config_dict = config_dict.get("vision_config", config_dict)
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a {found!r} encoder, not {cls.model_type!r}. Load it with the "
                "class of its own format, or point to the original-layout repository."
            )
        return cls.from_dict(drop_dead_vision_keys(config_dict), **kwargs)


InternVisionConfig.register_for_auto_class()
