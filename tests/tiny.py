"""Tiny checkpoints and configurations that several test files share; nothing in here is under test."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from internvl_hub.configuration_internvl_chat import InternVLChatConfig
from internvl_hub.modeling_internvl_chat import InternVLChatModel

CHAT = Path(__file__).parent / "fixtures" / "chat"
QWEN2, INTERNLM2, LLAMA, PHI3 = (
    "qwen2-internvl2_5",
    "internlm2-internlm2_chat",
    "llama-hermes2-vit6b",
    "phi3-phi3_chat",
)
CHECKPOINTS = (QWEN2, INTERNLM2, LLAMA, PHI3)
CONTEXT = 11  # id of <IMG_CONTEXT> in the fixtures' tokenizers
END_OF_TURN = {QWEN2: 4, INTERNLM2: 4, LLAMA: 4, PHI3: 8}  # ids of the text that ends an answer
VOCABULARY = 420

_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 4,
    "pad_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
_GPT_OSS = {
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False},
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
_PHI3_ROPE = {"type": "su", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 4.0]}
_SPECIFIC: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2ForCausalLM", {"rope_theta": 1e6}),
    "qwen3": ("Qwen3ForCausalLM", {"rope_theta": 1e6, "head_dim": 16}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"rope_theta": 1e6, **_EXPERTS}),
    "llama": ("LlamaForCausalLM", {"rope_theta": 5e6}),
    "phi3": ("Phi3ForCausalLM", {"original_max_position_embeddings": 128, "rope_scaling": _PHI3_ROPE}),
    "gpt_oss": ("GptOssForCausalLM", _GPT_OSS),
    "internlm2": ("InternLM2ForCausalLM", {"rope_theta": 1e6, "rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 8, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    "cohere": ("CohereForCausalLM", {"logit_scale": 0.25}),
    "granite": ("GraniteForCausalLM", {"logits_scaling": 4.0}),
    "recurrent_gemma": ("RecurrentGemmaForCausalLM", {"logits_soft_cap": 2.0, "num_hidden_layers": 3}),
}


def llm_dict(model_type: str, **changes: Any) -> dict[str, Any]:
    """A tiny `llm_config` as it stands in a released file."""
    architecture, specific = _SPECIFIC[model_type]
    values = {**_BASE, "model_type": model_type, "architectures": [architecture], **specific, **changes}
    return copy.deepcopy(values)  # transformers writes into the rope dictionary that it is given


def vision_dict(**changes: Any) -> dict[str, Any]:
    """A tiny `vision_config` of the 300M flavour: 4 x 4 patches, so 4 visual tokens per tile."""
    tiny = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "norm_type": "layer_norm",
        "qkv_bias": True,
        "qk_normalization": False,
        "initializer_range": 0.2,
    }
    return {**tiny, **changes}


def vision_6b_dict(**changes: Any) -> dict[str, Any]:
    """A tiny `vision_config` of the 6B flavour."""
    return vision_dict(**{"norm_type": "rms_norm", "qkv_bias": False, "qk_normalization": True, **changes})


def chat_config(model_type: str = "qwen2", **changes: Any) -> InternVLChatConfig:
    """A tiny complete configuration."""
    fields = {
        "vision_config": vision_dict(),
        "llm_config": llm_dict(model_type),
        "force_image_size": 56,
        "ps_version": "v2",
        "template": "internvl2_5",
        "img_context_token_id": CONTEXT,
    }
    return InternVLChatConfig(**{**fields, **changes})


def load(name: str, folder: Path | None = None, **options: Any) -> InternVLChatModel:
    """A fixture checkpoint in evaluation mode, its context token set as existing scripts do."""
    model = InternVLChatModel.from_pretrained(folder or CHAT / name, **options)
    model.img_context_token_id = CONTEXT
    return model.eval()


def expected(name: str) -> dict[str, torch.Tensor]:
    """The reference tensors of a fixture checkpoint."""
    return load_file(CHAT / name / "expected.safetensors")


def record(name: str) -> dict[str, Any]:
    """The reference losses, prompts and generated ids of a fixture checkpoint."""
    return json.loads((CHAT / name / "expected.json").read_text(encoding="utf-8"))


def batch(name: str, labels: bool = True) -> dict[str, torch.Tensor]:
    """The reference batch: two rows, right padded, with two tiles and one."""
    tensors = expected(name)
    keys = ["input_ids", "attention_mask"] + ["labels"] * labels
    return {"pixel_values": tensors["pixel_values"], **{key: tensors[f"forward.{key}"] for key in keys}}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every gradient by parameter name; the model's own are cleared."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], **tolerance: float) -> None:
    """Same names and, within `tolerance` (default: to the bit), same values."""
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(
            left[key], right[key], **(tolerance or {"rtol": 0, "atol": 0}), msg=lambda m, k=key: f"{k}: {m}"
        )


def by_hand(model: InternVLChatModel, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Embeddings of `ids` with one row of `features` after the other in place of the context tokens."""
    embeds = model.get_input_embeddings().weight.detach()[ids]
    rows = iter(features.reshape(-1, features.shape[-1]))
    for row, column in (ids == CONTEXT).nonzero().tolist():
        embeds[row, column] = next(rows)
    return embeds
