"""Names and shapes of InternVL weights on disk: the InternLM2 layout and transformers' native InternVL layout.

One owner for every key map and tensor operation; models register what they need from here.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

# ------------------------------------------------------------------------------------------------- InternLM2 <-> Llama


def split_wqkv(fused: torch.Tensor, heads: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Splits InternLM2's fused projection.

    Its rows are, per key/value head, the group's query heads, then one key head, then one value head.

    Args:
        fused: ((heads + 2 * kv_heads) * head_dim, ...).
        heads: Query heads.
        kv_heads: Key/value heads; divides `heads`.

    Returns:
        Query (heads * head_dim, ...), key and value (kv_heads * head_dim, ...).
    """
    group = heads // kv_heads
    blocks = fused.reshape(kv_heads, group + 2, -1, *fused.shape[1:])
    query, key, value = blocks[:, :group], blocks[:, group], blocks[:, group + 1]
    return query.flatten(0, 2).contiguous(), key.flatten(0, 1).contiguous(), value.flatten(0, 1).contiguous()


def fuse_wqkv(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, kv_heads: int) -> torch.Tensor:
    """The inverse of `split_wqkv`."""
    group, rest = heads // kv_heads, query.shape[1:]
    parts = [query.reshape(kv_heads, group, -1, *rest)]
    parts += [x.reshape(kv_heads, 1, -1, *rest) for x in (key, value)]
    return torch.cat(parts, dim=1).flatten(0, 2).contiguous()


def _heads(config: Any) -> tuple[int, int]:
    text = config.get_text_config()
    return text.num_attention_heads, text.num_key_value_heads


def _single(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, list) else value


class SplitWqkv(ConversionOps):
    """Load-time operation: one fused tensor becomes the tensors of the three target patterns."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        config: Any = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        fused = _single(next(iter(input_dict.values())))
        return dict(zip(target_patterns, split_wqkv(fused, *_heads(config)), strict=True))

    @property
    def reverse_op(self) -> ConversionOps:
        return FuseWqkv()


class FuseWqkv(ConversionOps):
    """Save-time operation: query, key and value become one fused tensor."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        config: Any = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        query, key, value = (_single(input_dict[pattern]) for pattern in source_patterns)
        return {target_patterns[0]: fuse_wqkv(query, key, value, *_heads(config))}

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitWqkv()


_INTERNLM2_RENAMINGS = {
    "tok_embeddings": "embed_tokens",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention.wo.": "self_attn.o_proj.",
    "^output.": "lm_head.",
}


def internlm2_conversions() -> list[WeightConverter | WeightRenaming]:
    """The reversible conversion between InternLM2's weights and Llama's, for transformers' loader."""
    renamings = [WeightRenaming(source, target) for source, target in _INTERNLM2_RENAMINGS.items()]
    fused = WeightConverter(
        ["attention.wqkv"], ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], operations=[SplitWqkv()]
    )
    return [*renamings, fused]


def internlm2_to_llama(state_dict: dict[str, torch.Tensor], heads: int, kv_heads: int) -> dict[str, torch.Tensor]:
    """A state dict of one InternLM2 model under Llama's names; keys that already have them pass unchanged.

    Args:
        state_dict: Keys relative to the language model (`model.layers.0.attention.wqkv.weight`, ...).
        heads, kv_heads: Of the model.
    """
    output: dict[str, torch.Tensor] = {}
    for key, tensor in state_dict.items():
        if ".attention.wqkv." in key:
            for name, part in zip("qkv", split_wqkv(tensor, heads, kv_heads), strict=True):
                output[key.replace("attention.wqkv", f"self_attn.{name}_proj")] = part
            continue
        for source, target in _INTERNLM2_RENAMINGS.items():
            key = re.sub(source if source.startswith("^") else re.escape(source), target, key)
        output[key] = tensor
    return output


# ---------------------------------------------------------------------------- original <-> transformers' InternVL keys

_NATIVE_RENAMINGS = (
    (r"^mlp1\.0\.", "model.multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "model.multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "model.multi_modal_projector.linear_2."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^vision_model\.embeddings\.class_embedding", "model.vision_tower.embeddings.cls_token"),
    (r"^vision_model\.embeddings\.patch_embedding", "model.vision_tower.embeddings.patch_embeddings.projection"),
    (r"^vision_model\.embeddings\.position_embedding", "model.vision_tower.embeddings.position_embeddings"),
    (r"^vision_model\.encoder\.layers\.", "model.vision_tower.encoder.layer."),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.([qk])_norm\.", r".attention.\1_norm."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.ls([12])$", r".lambda_\1"),
)


def original_to_native(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Original weights under the names of transformers' `InternVLForConditionalGeneration`.

    The language model must already carry transformers' names (InternLM2: `internlm2_to_llama`). Fused vision
    projections (`attn.qkv`, rows q | k | v) are split.
    """
    output: dict[str, torch.Tensor] = {}
    for key, tensor in state_dict.items():
        vision = key.startswith("vision_model.")
        for pattern, replacement in _NATIVE_RENAMINGS:
            if vision or not pattern.startswith(r"\."):
                key = re.sub(pattern, replacement, key)
        if ".attn.qkv." in key:
            for name, part in zip("qkv", tensor.chunk(3, dim=0), strict=True):
                output[key.replace(".attn.qkv.", f".attention.{name}_proj.")] = part.contiguous()
        else:
            output[key] = tensor
    return output
