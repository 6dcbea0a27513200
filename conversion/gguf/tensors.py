"""The tensors that llama.cpp's converter makes of an InternVL checkpoint: names, shapes and values.

Names come from the tables of the package `gguf`; what is done to values is stated here per architecture, as read in
llama.cpp's `conversion/` (`LLAMA_CPP`): queries and keys of Llama have their rows
reordered for another form of RoPE, InternLM2's fused projection is split first, experts are stacked, GPT-OSS's
interleaved projections are taken apart. Nothing is read until a value is compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ...checkpoint_internvl import LazyTensor, derive
from ...configuration_internvl_chat import InternVLChatConfig
from ...weights_internvl import split_wqkv
from .files import gguf_package

LLAMA_CPP = "0c1e57098"
"""The commit of llama.cpp whose converter and `tools/mtmd` were read and run (vendored in llama-cpp-python 0.3.36)."""

# The converter's names of the language models that InternVL is built around.
ARCHITECTURES = {
    "Qwen2ForCausalLM": "qwen2", "Qwen2MoeForCausalLM": "qwen2moe", "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe", "LlamaForCausalLM": "llama", "MistralForCausalLM": "llama",
    "InternLM2ForCausalLM": "internlm2", "Phi3ForCausalLM": "phi3", "GptOssForCausalLM": "gpt-oss",
}  # fmt: skip
# The converter finds no name for the projector of a shallower encoder.
FEWEST_LAYERS = 4
# Tensors that the converter adds, from the configuration: scales of RoPE.
ADDED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
OUTPUT, POSITIONS = "output.weight", "v.position_embd.weight"

_LANGUAGE, _VISION, _PROJECTOR = "language_model.", "vision_model.", "mlp1."
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_EXPERTS = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)(_bias)?")
_SUFFIXES = (".weight", ".bias")

Named = Iterator[tuple[str, LazyTensor]]


def vision_tensors(tensors: Mapping[str, LazyTensor], config: InternVLChatConfig) -> dict[str, LazyTensor]:
    """Encoder and projector under llama.cpp's names.

    Args:
        tensors: Under original names, adapters merged.
        config: Of the model.
    """
    package = gguf_package()
    # The table counts the projector's layers like the encoder's, and mlp1.3 is the last.
    layers = max(config.vision_config.num_hidden_layers, FEWEST_LAYERS)
    table = package.get_tensor_name_map(package.MODEL_ARCH.MMPROJ, layers)
    return {
        _mapped(table, name): tensor
        for key, source in tensors.items()
        if key.startswith((_VISION, _PROJECTOR))
        for name, tensor in _vision_parts(key, source)
    }


def _vision_parts(key: str, source: LazyTensor) -> Named:
    """A tensor of the encoder as the converter names it before its table; fused projections become three."""
    name = f"vision_tower.{key}" if key.startswith(_VISION) else key
    if ".attn.qkv." in name:
        for i, letter in enumerate("qkv"):
            part = derive([source], lambda fused, i=i: fused.chunk(3)[i])
            yield name.replace("attn.qkv", f"self_attn.{letter}_proj"), part
    elif re.search(r"(\.ls[12]|\.position_embedding)$", name):
        yield f"{name}.weight", source
    else:
        yield name, source


def class_last(positions: torch.Tensor) -> torch.Tensor:
    """Position embeddings (1, 1 + patches, width) with the class token's row moved to the end."""
    return positions.roll(-1, dims=1)


def text_tensors(tensors: Mapping[str, LazyTensor], config: InternVLChatConfig) -> dict[str, LazyTensor]:
    """The language model under llama.cpp's names.

    Args:
        tensors: Under original names, adapters merged.
        config: Of the model; the architecture of its language model is one of `ARCHITECTURES`.

    Returns:
        By name. A tensor for which the table has no name keeps its own.
    """
    package, llm = gguf_package(), config.llm_config
    name = ARCHITECTURES[(llm.architectures or [""])[0]]
    code = next(code for code, known in package.MODEL_ARCH_NAMES.items() if known == name)
    table = package.get_tensor_name_map(code, llm.num_hidden_layers)
    own = {key.removeprefix(_LANGUAGE): tensor for key, tensor in tensors.items() if key.startswith(_LANGUAGE)}
    own = {key: tensor for key, tensor in own.items() if not key.endswith(".rotary_emb.inv_freq")}
    return {_mapped(table, key): tensor for key, tensor in _CHANGES.get(name, _unchanged)(own, llm)}


def _mapped(table: Any, name: str) -> str:
    return table.get_name(name, try_suffixes=_SUFFIXES) or name


# ---------------------------------------------------------------------------------------------- what becomes of values


def _unchanged(tensors: Mapping[str, LazyTensor], llm: Any) -> Named:
    yield from tensors.items()


def rope_rows(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection (heads * head_dim, ...) in llama.cpp's order for Llama.

    transformers rotates the two halves of a head against each other, llama.cpp neighbouring rows.
    """
    halves = tensor.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def _llama(tensors: Mapping[str, LazyTensor], llm: Any) -> Named:
    for name, tensor in tensors.items():
        heads = {"q_proj": llm.num_attention_heads, "k_proj": llm.num_key_value_heads}.get(name.split(".")[-2])
        yield name, tensor if heads is None else derive([tensor], lambda x, heads=heads: rope_rows(x, heads))


def _internlm2(tensors: Mapping[str, LazyTensor], llm: Any) -> Named:
    heads, kv_heads = llm.num_attention_heads, llm.num_key_value_heads

    def part(i: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def compute(fused: torch.Tensor) -> torch.Tensor:
            tensor = split_wqkv(fused, heads, kv_heads)[i]
            return tensor if i == 2 else rope_rows(tensor, (heads, kv_heads)[i])

        return compute

    for name, tensor in tensors.items():
        if ".attention.wqkv." not in name:
            yield name, tensor
            continue
        for i, letter in enumerate("qkv"):
            yield name.replace("wqkv", f"w{letter}"), derive([tensor], part(i))


def _experts(tensors: Mapping[str, LazyTensor], llm: Any) -> Named:
    """Experts one by one become (experts, rows, columns); fused ones lose their first projection to two."""
    stacks: dict[str, dict[int, LazyTensor]] = {}
    for name, tensor in tensors.items():
        if single := _EXPERT.fullmatch(name):
            stacks.setdefault(f"{single[1]}.{single[3]}.weight", {})[int(single[2])] = tensor
        elif (fused := _EXPERTS.fullmatch(name)) and fused[2] == "gate_up_proj":
            for i, part in enumerate(("gate_proj", "up_proj")):
                yield f"{fused[1]}.{part}.weight", derive([tensor], lambda x, i=i: x.chunk(2, dim=-2)[i])
        else:
            yield (f"{name}.weight" if fused else name), tensor
    for name, found in stacks.items():
        yield name, derive([found[i] for i in sorted(found)], lambda *parts: torch.stack(parts))


def _gpt_oss(tensors: Mapping[str, LazyTensor], llm: Any) -> Named:
    """Gate and up lie in turns, and matrices are stored transposed."""
    for name, tensor in tensors.items():
        found = _EXPERTS.fullmatch(name)
        if found is None:
            yield (f"{name}.weight" if name.endswith(".sinks") else name), tensor
            continue
        suffix = ".bias" if found[3] else ".weight"
        upright = tensor if found[3] else derive([tensor], lambda x: x.transpose(-1, -2))
        if found[2] == "down_proj":
            yield f"{found[1]}.down_proj{suffix}", upright
            continue
        for i, part in enumerate(("gate_proj", "up_proj")):
            rows = derive([upright], lambda x, i=i, b=found[3]: x[:, i::2] if b else x[:, i::2, :])
            yield f"{found[1]}.{part}{suffix}", rows


_CHANGES: dict[str, Callable[[Mapping[str, LazyTensor], Any], Named]] = {
    "llama": _llama, "internlm2": _internlm2, "qwen2moe": _experts, "qwen3moe": _experts, "gpt-oss": _gpt_oss,
}  # fmt: skip
