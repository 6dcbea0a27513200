"""InternVL-Chat: InternViT, pixel shuffle, an MLP projector and a causal language model of transformers.

Parameters carry their on-disk names (`vision_model.*`, `mlp1.*`, `language_model.*` with the whole causal LM inside).
Talking to the model (`chat`, `batch_chat`, `stream_chat`) lives in `chat_internvl.py`, `generate` in
`decoding_internvl.py`, the loss in `supervision_internvl.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version

if Version(transformers.__version__) < Version("5.11.0"):
    raise ImportError(
        f"InternVL needs transformers >= 5.11.0, found {transformers.__version__}: pip install -U transformers"
    )

from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from .analysis_internvl import InternVLAnalysisMixin
from .chat_internvl import InternVLChatMixin
from .checkpoint_internvl import scan_files
from .configuration_internvl_chat import InternVLChatConfig
from .decoding_internvl import InternVLDecodingMixin
from .losses_internvl import LabelLogProbsOutput
from .modeling_intern_vit import InternVisionModel, request_flash_attention
from .modeling_internlm2 import InternLM2ForCausalLM, mend_dynamic_ntk
from .native_internvl import foreign_tensors
from .quantization_internvl import keep_vision_unquantized, misread_layers, refuse_repacked
from .resuming_internvl import accept_disk_names
from .supervision_internvl import InternVLSupervisionMixin

logger = logging.get_logger(__name__)


class VisualTokenMismatchError(ValueError):
    """Context tokens in the prompt and visual features differ in number."""


def pixel_shuffle(features: torch.Tensor, scale: float = 0.5, ps_version: str = "v2") -> torch.Tensor:
    """Trades resolution for channels: (N, H, W, C) -> (N, H * scale, W * scale, C / scale**2).

    An output vector concatenates its source cells with the row offset slow and the column offset fast. `"v1"`, of
    early checkpoints, returns the same vectors with rows and columns of the map exchanged (original
    `modeling_internvl_chat.py`).
    """
    n, height, width, channels = features.shape
    features = features.reshape(n, height, int(width * scale), int(channels / scale))
    features = features.permute(0, 2, 1, 3)
    features = features.reshape(n, int(width * scale), int(height * scale), int(channels / scale**2))
    return features.permute(0, 2, 1, 3).contiguous() if ps_version == "v2" else features.contiguous()


def build_language_model(config: Any) -> PreTrainedModel:
    """The causal language model of an `llm_config`; shares the configuration object with it."""
    if config.model_type == "internlm2":
        return InternLM2ForCausalLM(config)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    mend_dynamic_ntk(model)
    return model


def _keep_packed_rows_apart(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Gives a decoder the masks of rows whose positions start anew; none where flash attention knows their lengths.

    transformers' models make them too, but some (gpt-oss) without looking at the positions. A hook, because the head
    around the decoder takes a mask for one of padding.
    """
    positions, embeds = kwargs.get("position_ids"), kwargs.get("inputs_embeds")
    plain = kwargs.get("attention_mask") is None and kwargs.get("past_key_values") is None
    if plain and kwargs.get("use_cache") is False and embeds is not None and getattr(positions, "ndim", 0) == 2:
        kwargs["attention_mask"] = create_masks_for_generate(decoder.config, embeds, None, None, positions)
    return args, kwargs


class HeadlessView:
    """Callable view of a model without its output head, as trainers expect under `model.base_model`."""

    def __init__(self, model: InternVLChatModel) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return self._model.forward_hidden(*args, **kwargs)


class InternVLChatModel(
    InternVLChatMixin,
    InternVLAnalysisMixin,
    InternVLSupervisionMixin,
    InternVLDecodingMixin,
    PreTrainedModel,
    GenerationMixin,
):
    """InternVL-Chat (1.1 to 3.5; original `modeling_internvl_chat.py`).

    Args:
        config: The configuration.
        vision_model, language_model: Ready towers to compose instead of fresh ones.
        use_flash_attn: As existing scripts pass it: True asks for FlashAttention 2 in both towers and, where it is
            not available, says so and uses SDPA.
    """

    config_class = InternVLChatConfig
    config: InternVLChatConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: InternVLChatConfig,
        vision_model: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
        use_flash_attn: bool | None = None,
    ) -> None:
        if config.use_backbone_lora or config.use_llm_lora:
            config = _without_adapters(config)
        if use_flash_attn:
            request_flash_attention(config)
        super().__init__(config)
        self.vision_model = InternVisionModel(config.vision_config) if vision_model is None else vision_model
        self.language_model = build_language_model(config.llm_config) if language_model is None else language_model
        self.language_model.get_decoder().register_forward_pre_hook(_keep_packed_rows_apart, with_kwargs=True)
        self.mlp1 = self._build_projector(config)
        self.select_layer = config.select_layer
        self.template = config.template
        self.downsample_ratio = config.downsample_ratio
        self.ps_version = config.ps_version
        self.num_image_token = config.tokens_per_tile(1)[0]
        self._can_compile_fullgraph = getattr(self.language_model, "_can_compile_fullgraph", False)
        self._init_chat()
        self.register_load_state_dict_pre_hook(accept_disk_names)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> InternVLChatModel:
        """As in transformers; a `quantization_config` leaves encoder, projector and output head as they are.

        Unless it lists itself what to leave out (`quantization_internvl.py`).

        Raises:
            OSError: a folder holds adapters alone.
        """
        _refuse_adapters(pretrained_model_name_or_path)
        saved = getattr(kwargs.get("config"), "quantization_config", None)
        if saved is None and kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = keep_vision_unquantized(kwargs["quantization_config"])
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        if misread := misread_layers(model):
            logger.warning(
                f"bitsandbytes unpacks the 4-bit weights of {len(misread)} layers wrongly on a CPU (such as "
                f"{misread[0]}): their width is no multiple of the block. Quantize with torchao there."
            )
        return loaded

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers.

        Raises:
            ValueError: bitsandbytes has repacked 4-bit weights, whose scales it would save wrongly.
        """
        refuse_repacked(self)
        return super().save_pretrained(*args, **kwargs)

    @staticmethod
    def _load_pretrained_model(
        model: InternVLChatModel,
        state_dict: dict[str, Any] | None,
        checkpoint_files: list[str] | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As the base class, for files of the native layout and for adapter-wrapped ones too.

        Raises:
            CheckpointError: a file is damaged.
            LayoutError: the names are those of no layout.
        """
        if state_dict is None and checkpoint_files:
            foreign = foreign_tensors(scan_files(checkpoint_files).checked().tensors, model.config)
            if foreign is not None:
                state_dict, checkpoint_files = foreign, None
                if is_deepspeed_zero3_enabled():  # its loader scatters tensors and knows no lazy ones
                    state_dict = {name: tensor[...] for name, tensor in foreign.items()}
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    @staticmethod
    def _build_projector(config: InternVLChatConfig) -> nn.Sequential:
        width = config.vision_config.hidden_size * int(1 / config.downsample_ratio) ** 2
        hidden = config.llm_config.hidden_size
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))

    # --------------------------------------------------------------------------------------------- pieces of the model

    @property
    def img_context_token_id(self) -> int | None:
        """Id of `<IMG_CONTEXT>`; assigning it, as existing scripts do, also stores it in the configuration."""
        return self.config.img_context_token_id

    @img_context_token_id.setter
    def img_context_token_id(self, value: int | None) -> None:
        self.config.img_context_token_id = value

    @property
    def base_model(self) -> HeadlessView:
        """The model without its head: call it for a `last_hidden_state` (TRL computes losses on it)."""
        return HeadlessView(self)

    @property
    def lm_head(self) -> nn.Module:
        """The language model's output head."""
        return self.language_model.get_output_embeddings()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the language model's token embeddings."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's output head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the language model's output head."""
        self.language_model.set_output_embeddings(value)

    def get_decoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The language model without its head (it knows nothing of images; see `base_model`)."""
        return self.language_model.get_decoder()

    # -------------------------------------------------------------------------------------------------------- features

    def pixel_shuffle(self, features: torch.Tensor, scale_factor: float = 0.5) -> torch.Tensor:
        """`pixel_shuffle` in this checkpoint's version."""
        return pixel_shuffle(features, scale_factor, self.ps_version)

    def _tower_states(self, pixel_values: torch.Tensor) -> tuple[BaseModelOutputWithPooling, torch.Tensor]:
        """The tower's output, and (tiles, 1 + patches, width) of its layer that the projector reads."""
        self._check_pixel_values(pixel_values)
        last_only = self.select_layer == -1
        vision = self.vision_model(pixel_values=pixel_values, output_hidden_states=not last_only)
        return vision, vision.last_hidden_state if last_only else vision.hidden_states[self.select_layer]

    def _encode_tiles(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        vision, states = self._tower_states(pixel_values)
        patches = states[:, 1:]
        side = round(patches.shape[1] ** 0.5)
        grid = self.pixel_shuffle(patches.reshape(patches.shape[0], side, side, -1), self.downsample_ratio)
        projected = self.mlp1(grid.flatten(1, 2))
        return BaseModelOutputWithPooling(last_hidden_state=vision.last_hidden_state, pooler_output=projected)

    def _check_pixel_values(self, pixel_values: torch.Tensor) -> None:
        size, shape = self.config.image_size, tuple(getattr(pixel_values, "shape", ()))
        if len(shape) != 4 or shape[-2:] != (size, size):
            raise ValueError(
                f"pixel_values has shape {shape}; expected (tiles, 3, {size}, {size}). Make it with the checkpoint's "
                "InternVLImageProcessor; a single tile needs a leading dimension: pixel_values.unsqueeze(0)."
            )

    def extract_feature(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Visual tokens of tiles.

        Args:
            pixel_values: (tiles, 3, S, S), normalised.

        Returns:
            (tiles, tokens per tile, hidden size of the language model).
        """
        return self._encode_tiles(pixel_values).pooler_output

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """As in transformers: `pooler_output` is `extract_feature(pixel_values)`, `last_hidden_state` the tower's."""
        return self._encode_tiles(pixel_values)

    def embed_prompt(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        visual_features: torch.Tensor | None = None,
        image_flags: torch.Tensor | None = None,
        tile_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Token embeddings with visual features written over the context tokens, in order.

        Args:
            input_ids: (B, L).
            pixel_values: (tiles, 3, S, S) of all images of the batch, in order of appearance; no tiles are no images.
            visual_features: Features to use instead of encoding `pixel_values`: (tiles, tokens, D) or (tokens, D).
            image_flags: (tiles,) or (tiles, 1): 0 marks a dummy tile whose features are not used.
            tile_index: (places,) int64, instead of `image_flags`: the tile that stands at each place, so that rows
                about the same image share its features; tiles that it does not name are not used.

        Returns:
            (B, L, D).

        Raises:
            VisualTokenMismatchError: context tokens and features differ in number.
            ValueError: `img_context_token_id` is unknown though there are images, or `image_flags` or `tile_index`
                does not fit the tiles.
        """
        embeds = self.get_input_embeddings()(input_ids)
        features = visual_features
        if features is None and pixel_values is not None and pixel_values.shape[0] > 0:
            features = self.extract_feature(pixel_values)
        if features is not None:
            features = _used_features(features, image_flags, tile_index).to(embeds)
        mask = self._context_mask(input_ids, features)
        if mask is None:
            return embeds
        return embeds.masked_scatter(mask.unsqueeze(-1).to(embeds.device), features)

    def _context_mask(self, input_ids: torch.Tensor, features: torch.Tensor | None) -> torch.Tensor | None:
        """Mask of context tokens, checked against the features; None where there is nothing to write."""
        token = self.img_context_token_id
        if token is None:
            if features is not None:
                raise ValueError(
                    "img_context_token_id is unknown: set model.img_context_token_id = "
                    "tokenizer.convert_tokens_to_ids('<IMG_CONTEXT>'), or save it in the configuration."
                )
            return None
        mask = input_ids == token
        if not torch.compiler.is_compiling():  # a data-dependent check would break the graph
            slots, rows = int(mask.sum()), 0 if features is None else features.shape[0]
            if slots != rows:
                raise VisualTokenMismatchError(
                    f"The prompt has {slots} <IMG_CONTEXT> token(s) but there are {rows} visual feature(s). Each tile "
                    f"takes {self.num_image_token}. Was the prompt truncated, or are images or placeholders missing?"
                )
        return None if features is None else mask

    # --------------------------------------------------------------------------------------------------------- forward

    def _inputs_embeds(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        past_key_values: Any,
        pixel_values: torch.Tensor | None,
        visual_features: torch.Tensor | None,
        image_flags: torch.Tensor | None,
        tile_index: torch.Tensor | None,
    ) -> torch.Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is not None:
            return inputs_embeds
        # After the prefill a context token is one that the model wrote itself: text like any other. Single tokens come
        # first, because a static cache's length is a tensor, on which a compiled decoding step must not branch.
        decoding = past_key_values is not None and (input_ids.shape[1] == 1 or past_key_values.get_seq_length() > 0)
        if decoding and pixel_values is None and visual_features is None:
            return self.get_input_embeddings()(input_ids)
        return self.embed_prompt(input_ids, pixel_values, visual_features, image_flags, tile_index)

    def forward_hidden(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        visual_features: torch.FloatTensor | None = None,
        image_flags: torch.Tensor | None = None,
        tile_index: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_patches: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """`forward` up to the last hidden state (B, L, D), before the output head; arguments as there."""
        inputs_embeds = self._inputs_embeds(
            input_ids, inputs_embeds, past_key_values, pixel_values, visual_features, image_flags, tile_index
        )
        return self.language_model.get_decoder()(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=self._use_cache(use_cache),
            **kwargs,
        )

    def _use_cache(self, use_cache: bool | None) -> bool | None:
        return False if use_cache is None and self.training else use_cache

    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        image_flags: torch.Tensor | None = None,
        past_key_values: Any = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        statistics: Any = None,
        loss_weight: torch.Tensor | Sequence | None = None,
        loss_reduction_all_gather: bool = False,
        inputs_embeds: torch.Tensor | None = None,
        visual_features: torch.FloatTensor | None = None,
        num_patches: Any = None,
        num_items_in_batch: torch.Tensor | float | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_logits: bool | None = None,
        tile_index: torch.LongTensor | None = None,
        output_log_probs: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | LabelLogProbsOutput | tuple:
        """Runs the model on a batch that mixes image and text rows as it likes.

        Args:
            pixel_values: (tiles, 3, S, S) of all images in order of appearance, or None.
            input_ids: (B, L) with `<IMG_CONTEXT>` where visual tokens go.
            attention_mask: (B, L).
            position_ids: (B, L). Without mask and cache (`use_cache=False`, or training), a row of them that starts
                anew at 0 is a pack: its parts do not see one another.
            image_flags: (tiles,) or (tiles, 1); 0 marks a dummy tile, which runs through the encoder (so that its
                parameters stay in the graph on text-only ranks) but is not used.
            past_key_values: A cache; images belong to the prefill.
            labels: (B, L), -100 where no loss is taken.
            loss_weight: (B, L) weight of each label (`data`'s collator makes it); None for ones.
            loss_reduction_all_gather: Average the normaliser over ranks.
            statistics: Accepted as existing scripts pass it; not used.
            inputs_embeds: (B, L, D) instead of `input_ids`.
            visual_features: Ready features instead of `pixel_values`.
            num_patches: Tiles per image, as the processor returns it; not needed here.
            num_items_in_batch: Sum of label weights (without weights: number of labels) over the global batch, from
                `Trainer`. The loss is then the sum over this batch divided by it, and a router loss counts by the
                share of the weights that are in this batch.
            logits_to_keep: Last positions (or indices) to compute logits for; 0 for all.
            output_logits: Whether to return logits along with a loss. None: not while training, where only
                supervised positions reach the head, in chunks.
            tile_index: (places,) int64, see `embed_prompt`: rows about the same image encode it once.
            output_log_probs: Return the log-probability of each label instead of a loss.

        Returns:
            `loss` (sum of weight x cross-entropy / sum of weights), `logits` (B, L, V), `past_key_values`, ... With
            `output_log_probs`, `log_probs` (M,) and `aux_loss` alone (`LabelLogProbsOutput`).

        Raises:
            VisualTokenMismatchError: context tokens and visual features differ in number.
            ValueError: no supervised token, wrong shapes, `loss_weight` with an unweighted `num_items_in_batch`, or
                `output_log_probs` without labels.
        """
        inputs_embeds = self._inputs_embeds(
            input_ids, inputs_embeds, past_key_values, pixel_values, visual_features, image_flags, tile_index
        )
        inputs = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": self._use_cache(use_cache),
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            **kwargs,
        }
        inputs = {key: value for key, value in inputs.items() if value is not None}
        if output_log_probs:
            outputs = self._label_log_probs(inputs, labels)
        elif labels is None:
            outputs = self.language_model(**inputs, logits_to_keep=logits_to_keep)
        else:
            logits = output_logits if output_logits is not None else not self.training
            outputs = self._supervised(
                inputs, labels, loss_weight, num_items_in_batch, loss_reduction_all_gather, logits, logits_to_keep
            )
        return outputs if return_dict in (None, True) else outputs.to_tuple()


def _used_features(
    features: torch.Tensor, image_flags: torch.Tensor | None, tile_index: torch.Tensor | None
) -> torch.Tensor:
    """Features of the used tiles in the order of their places, (tokens, D)."""
    if tile_index is not None:
        if image_flags is not None or features.ndim != 3:
            raise ValueError("tile_index goes with features of whole tiles, (tiles, tokens, D), and no image_flags.")
        index = torch.as_tensor(tile_index, device=features.device)
        _check_tile_index(index, len(features))
        features = features[index]
    elif image_flags is not None:
        used = torch.as_tensor(image_flags, device=features.device).reshape(-1) == 1
        if used.shape[0] != features.shape[0]:
            raise ValueError(f"image_flags has {used.shape[0]} entries for {features.shape[0]} tiles.")
        features = features[used]
    return features.reshape(-1, features.shape[-1])


def _check_tile_index(index: torch.Tensor, tiles: int) -> None:
    if torch.compiler.is_compiling() or not index.numel():  # a data-dependent check would break the graph
        return
    if not 0 <= int(index.min()) <= int(index.max()) < tiles:
        raise ValueError(f"tile_index names tiles {int(index.min())} to {int(index.max())} of {tiles}.")


def _refuse_adapters(name_or_path: Any) -> None:
    folder = Path(str(name_or_path))  # of a training run; one with peft's files alone transformers reads itself
    adapters = (folder / "adapter_config.json").is_file() and (folder / "config.json").is_file()
    if adapters and not [*folder.glob("model*.safetensors*"), *folder.glob("pytorch_model*.bin*")]:
        raise OSError(
            f"{folder} holds adapters, not a model: `internvl merge {folder} merged` writes the whole one, and "
            "peft.PeftModel.from_pretrained(base_model, folder) puts them onto their base."
        )


def _without_adapters(config: InternVLChatConfig) -> InternVLChatConfig:
    logger.warning(
        f"use_backbone_lora {config.use_backbone_lora}, use_llm_lora {config.use_llm_lora}: adapters in a checkpoint "
        "are merged into its weights when it is loaded; the model in memory has none. Train new ones with peft."
    )
    config = copy.deepcopy(config)
    config.use_backbone_lora = config.use_llm_lora = 0
    return config


InternVLChatModel.register_for_auto_class("AutoModel")
