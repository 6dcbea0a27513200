"""Any causal language model of transformers inside InternVL: exact, saved, trained, heads with extras too."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import CONTEXT, assert_same, chat_config, gradients, llm_dict
from transformers import AutoConfig, AutoModelForCausalLM

from internvl_hub.modeling_internvl_chat import InternVLChatModel

BACKENDS = ("qwen2", "qwen3", "qwen3_moe", "llama", "phi3", "gpt_oss", "gemma2", "cohere", "mistral", "internlm2")
EACH = pytest.mark.parametrize("backend", BACKENDS)


def _model(backend: str) -> InternVLChatModel:
    return InternVLChatModel(chat_config(backend)).eval()


def _batch() -> dict[str, torch.Tensor]:
    """One row with a tile and one without, right padded."""
    ids = torch.tensor([[3, 9, *[CONTEXT] * 4, 10, 40, 41, 42, 4], [3, 50, 51, 52, 53, 54, 4, 2, 2, 2, 2]])
    mask = (torch.arange(11) < torch.tensor([[11], [7]])).long()
    labels = torch.where((torch.arange(11) > 3) & (ids > 20), ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": torch.randn(1, 3, 56, 56)}


@EACH
@torch.no_grad()
def test_text_logits_are_the_bare_language_models(backend: str) -> None:
    """Against the class that transformers itself builds; InternLM2 against Llama."""
    model, ids = _model(backend), torch.randint(20, 400, (2, 9))
    values = llm_dict(
        "llama", **{k: v for k, v in llm_dict(backend).items() if k not in ("model_type", "architectures")}
    )
    values = values if backend == "internlm2" else model.config.llm_config.to_dict()
    model_type = "llama" if backend == "internlm2" else backend
    bare = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**values, "model_type": model_type})).eval()
    bare.load_state_dict(model.language_model.state_dict(), strict=True)
    assert torch.equal(model(input_ids=ids).logits, bare(input_ids=ids).logits)


@EACH
@torch.no_grad()
def test_save_and_reload(backend: str, tmp_path: Path) -> None:
    model, batch = _model(backend), _batch()
    model.save_pretrained(tmp_path)
    again = InternVLChatModel.from_pretrained(tmp_path)
    assert type(again.language_model) is type(model.language_model)
    assert_same(again.state_dict(), model.state_dict())
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_experts_are_saved_one_by_one(tmp_path: Path) -> None:
    """As Qwen3-MoE checkpoints on the Hub are, though transformers 5 holds them fused."""
    model = _model("qwen3_moe")
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    prefix = "language_model.model.layers.1.mlp.experts"
    fused = model.state_dict()[f"{prefix}.gate_up_proj"]
    for expert in range(4):
        parts = [saved[f"{prefix}.{expert}.{name}_proj.weight"] for name in ("gate", "up")]
        assert torch.equal(torch.cat(parts), fused[expert])
    assert not [key for key in saved if "gate_up_proj" in key]


@pytest.mark.parametrize("backend", [*BACKENDS, "granite", "recurrent_gemma"])
def test_training_loss_equals_evaluation_loss(backend: str) -> None:
    """Heads with soft caps or scales (Gemma 2, Cohere, ...) are where a loss on bare head outputs would go wrong."""
    model, batch = _model(backend), _batch()
    reference = model(**batch)
    shifted = torch.nn.functional.cross_entropy(
        reference.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    )
    torch.testing.assert_close(reference.loss, shifted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.train()(**batch).loss, shifted, rtol=1e-5, atol=1e-5)


@EACH
def test_a_training_step_learns(backend: str) -> None:
    model, batch = _model(backend).train(), _batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(2):
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    assert losses[1] < losses[0]
    found = gradients(model)
    assert all(bool(found[name].isfinite().all()) for name in found)
    assert found["mlp1.1.weight"].any() and found["vision_model.embeddings.class_embedding"].any()


@EACH
def test_generates_with_and_without_cache(backend: str) -> None:
    model, batch = _model(backend), _batch()
    inputs = {"input_ids": batch["input_ids"][:1], "pixel_values": batch["pixel_values"]}
    options = {"max_new_tokens": 5, "do_sample": False}
    cached = model.generate(**inputs, **options)
    assert torch.equal(cached[:, :11], inputs["input_ids"])
    assert torch.equal(model.generate(**inputs, **options, use_cache=False), cached)


def test_router_loss_is_added_where_the_configuration_asks_for_it() -> None:
    llm = llm_dict("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.5)
    model, batch = InternVLChatModel(chat_config(llm_config=llm)), _batch()
    for training in (True, False):
        output = model.train(training)(**batch)
        logits = output.logits[:, :-1].flatten(0, 1)
        plain = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten())
        assert output.aux_loss > 0
        torch.testing.assert_close(output.loss, plain + 0.5 * output.aux_loss)
