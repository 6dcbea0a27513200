"""Names and shapes of InternVL weights on disk: the original layout, transformers' native one, InternLM2, LoRA.

One owner for every key map and tensor operation; models register what they need from here. The maps take tensors in
memory and `LazyTensor`s alike, so loading a foreign layout and converting a checkpoint share them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from .checkpoint_internvl import LazyTensor, derive

AnyTensor = torch.Tensor | LazyTensor


class LayoutError(ValueError):
    """The names of a checkpoint's tensors are not those of the layout that it claims."""


def _apply(compute: Callable[..., torch.Tensor], *sources: AnyTensor) -> AnyTensor:
    """`compute(*sources)`: at once for tensors, when read for lazy ones."""
    if any(isinstance(source, LazyTensor) for source in sources):
        return derive([x if isinstance(x, LazyTensor) else LazyTensor.of(x) for x in sources], compute)
    return compute(*sources)


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


def internlm2_to_llama(state_dict: Mapping[str, Any], heads: int, kv_heads: int) -> dict[str, Any]:
    """A state dict of one InternLM2 model under Llama's names; keys that already have them pass unchanged.

    Args:
        state_dict: Keys relative to the language model (`model.layers.0.attention.wqkv.weight`, ...).
        heads, kv_heads: Of the model.
    """
    output: dict[str, Any] = {}
    for key, tensor in state_dict.items():
        if ".attention.wqkv." in key:
            for i, name in enumerate("qkv"):
                part = _apply(lambda x, i=i: split_wqkv(x, heads, kv_heads)[i], tensor)
                output[key.replace("attention.wqkv", f"self_attn.{name}_proj")] = part
            continue
        for source, target in _INTERNLM2_RENAMINGS.items():
            key = re.sub(source if source.startswith("^") else re.escape(source), target, key)
        output[key] = tensor
    return output


def llama_to_internlm2(state_dict: Mapping[str, Any], heads: int, kv_heads: int) -> dict[str, Any]:
    """The inverse of `internlm2_to_llama`."""
    output: dict[str, Any] = {}
    for key, tensor in state_dict.items():
        if re.search(r"\.self_attn\.[kv]_proj\.", key):
            continue  # fused with the query
        if ".self_attn.q_proj." in key:
            parts = _siblings(state_dict, key, "self_attn.q_proj", ("self_attn.k_proj", "self_attn.v_proj"))
            key = key.replace("self_attn.q_proj", "attention.wqkv")
            tensor = _apply(lambda q, k, v: fuse_wqkv(q, k, v, heads, kv_heads), tensor, *parts)
        for target, source in _INTERNLM2_RENAMINGS.items():
            anchor = "^" if target.startswith("^") else ""
            key = re.sub(anchor + re.escape(source), target.removeprefix("^"), key)
        output[key] = tensor
    return output


def _siblings(tensors: Mapping[str, Any], key: str, own: str, others: tuple[str, ...]) -> list[Any]:
    """The tensors under the same name as `key` but for `own`, which becomes each of `others`."""
    names = [key.replace(own, other) for other in others]
    if missing := [name for name in names if name not in tensors]:
        raise LayoutError(f"{key} has no counterpart {missing[0]}: the checkpoint is incomplete.")
    return [tensors[name] for name in names]


# ---------------------------------------------------------------------------- original <-> transformers' InternVL keys

# (original, native): the names under which transformers saves its InternVL, which are older than those that it has in
# memory. Language models keep theirs. Applied to the start of a key.
_NATIVE_PREFIXES = (
    ("mlp1.0.", "multi_modal_projector.layer_norm."),
    ("mlp1.1.", "multi_modal_projector.linear_1."),
    ("mlp1.3.", "multi_modal_projector.linear_2."),
    ("language_model.", "language_model."),
    ("vision_model.embeddings.class_embedding", "vision_tower.embeddings.cls_token"),
    ("vision_model.embeddings.patch_embedding.", "vision_tower.embeddings.patch_embeddings.projection."),
    ("vision_model.embeddings.position_embedding", "vision_tower.embeddings.position_embeddings"),
    ("vision_model.encoder.layers.", "vision_tower.encoder.layer."),
)
# Inside a vision layer.
_NATIVE_LAYER = (
    ("attn.proj.", "attention.projection_layer."),
    ("attn.q_norm.", "attention.q_norm."),
    ("attn.k_norm.", "attention.k_norm."),
    ("norm1.", "layernorm_before."),
    ("norm2.", "layernorm_after."),
    ("ls1", "lambda_1"),
    ("ls2", "lambda_2"),
    ("mlp.fc1.", "mlp.fc1."),
    ("mlp.fc2.", "mlp.fc2."),
)
# Names in memory, which some files have.
_MEMORY_NATIVE = (
    ("lm_head.", "language_model.lm_head."),
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)


def _swap_prefix(key: str, table: Any, layout: str) -> str:
    for source, target in table:
        if key.startswith(source):
            return target + key[len(source) :]
    raise LayoutError(f"{key} is no name of the {layout} layout.")


def original_to_native(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Original weights under the names that transformers' `InternVLForConditionalGeneration` saves.

    The language model must already carry transformers' names (InternLM2: `internlm2_to_llama`). Fused vision
    projections (`attn.qkv`, rows q | k | v) are split.

    Raises:
        LayoutError: a key is not one of the original layout.
    """
    output: dict[str, Any] = {}
    for key, tensor in tensors.items():
        new = _swap_prefix(key, _NATIVE_PREFIXES, "original")
        if not key.startswith("vision_model.encoder."):
            output[new] = tensor
            continue
        prefix, inner = _layer_of(new)
        if inner.startswith("attn.qkv."):
            for i, name in enumerate("qkv"):
                part = _apply(lambda x, i=i: x.chunk(3, dim=0)[i].contiguous(), tensor)
                output[f"{prefix}attention.{name}_proj.{inner.removeprefix('attn.qkv.')}"] = part
        else:
            output[prefix + _swap_prefix(inner, _NATIVE_LAYER, "original")] = tensor
    return output


def native_to_original(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `original_to_native`; the names that transformers has in memory are understood too.

    Raises:
        LayoutError: a key is not one of the native layout, or a part of a fused projection is missing.
    """
    named = {_saved_native(key): tensor for key, tensor in tensors.items()}
    back = [(native, original) for original, native in _NATIVE_PREFIXES]
    layer_back = [(native, original) for original, native in _NATIVE_LAYER]
    output: dict[str, Any] = {}
    for key, tensor in named.items():
        new = _swap_prefix(key, back, "native")
        if not new.startswith("vision_model.encoder."):
            output[new] = tensor
            continue
        prefix, inner = _layer_of(new)
        if inner.startswith(("attention.k_proj.", "attention.v_proj.")):
            continue  # fused with the query
        if inner.startswith("attention.q_proj."):
            others = _siblings(named, key, "q_proj", ("k_proj", "v_proj"))
            fused = _apply(lambda q, k, v: torch.cat([q, k, v]), tensor, *others)
            output[f"{prefix}attn.qkv.{inner.removeprefix('attention.q_proj.')}"] = fused
        else:
            output[prefix + _swap_prefix(inner, layer_back, "native")] = tensor
    return output


def _saved_native(key: str) -> str:
    if key.startswith(("model.", "lm_head.")):
        return _swap_prefix(key, _MEMORY_NATIVE, "native")
    return key


def _layer_of(key: str) -> tuple[str, str]:
    """Splits after the layer's number: `("...layer.3.", "attn.qkv.weight")`."""
    match = re.match(r"(.*?\.layers?\.\d+\.)(.+)", key)
    if match is None:
        raise LayoutError(f"{key} has no layer number.")
    return match[1], match[2]


# ------------------------------------------------------------------------------------------------------ LoRA at read

_LORA_KEY = re.compile(r"(.*)\.lora_([AB])\.\w+\.weight")
# The original wrappers use alpha = 2 * rank for both towers.
LORA_SCALING = 2.0


def holds_lora(names: Any) -> bool:
    """Whether adapters are stored among these tensor names."""
    return any(_LORA_KEY.fullmatch(name) for name in names)


def merge_lora(tensors: Mapping[str, Any], scaling: float = LORA_SCALING) -> dict[str, Any]:
    """Weights of an adapter-wrapped original checkpoint (`use_backbone_lora`, `use_llm_lora`) with adapters merged.

    `W + scaling * B @ A`, computed in float32 and rounded once to the dtype of W; every other tensor keeps its bits.

    Args:
        tensors: Names as PEFT wraps them: `language_model.base_model.model.<name>`, `<module>.base_layer.weight`,
            `<module>.lora_A.default.weight` (rank, in), `<module>.lora_B.default.weight` (out, rank).
        scaling: alpha / rank.

    Raises:
        LayoutError: half of an adapter, or one for a weight that is not there.
    """
    adapters: dict[str, dict[str, Any]] = {}
    output: dict[str, Any] = {}
    for key, tensor in tensors.items():
        key = key.replace(".base_model.model.", ".", 1)
        if match := _LORA_KEY.fullmatch(key):
            adapters.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor
        else:
            output[key.replace(".base_layer.", ".")] = tensor
    for key, pair in adapters.items():
        if set(pair) != {"A", "B"} or key not in output:
            raise LayoutError(f"the adapter of {key} is incomplete: fetch the checkpoint again.")
        output[key] = _apply(lambda w, a, b: _merged(w, a, b, scaling), output[key], pair["A"], pair["B"])
    return output


def _merged(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scaling: float) -> torch.Tensor:
    return (weight.float() + scaling * (up.float() @ down.float())).to(weight.dtype)
