"""A pack is its rows: same loss, gradients and logits as each row alone, for every language model and backend.

The reference never sees the collator: it runs a row by itself, with nothing but ids and tiles, and adds up weighted
cross-entropies in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import CONTEXT, assert_same, chat_config, gradients, llm_dict
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, set_seed

from internvl_hub.modeling_internvl_chat import InternVLChatModel
from internvl_hub.training.collation import InternVLCollator
from internvl_hub.training.packed_attention import attention_by_row

Row = dict[str, Any]

BACKBONES = ("qwen2", "internlm2", "llama", "phi3", "qwen3", "qwen3_moe", "gpt_oss")
EXPERTS = ("qwen3_moe", "gpt_oss")
NO_SINKS = [kind for kind in BACKBONES if kind != "gpt_oss"]  # sinks run on eager, and on flex attention on a GPU
SLIDING = {"phi3": {"sliding_window": 5}, "gpt_oss": {"sliding_window": 4}}
EAGER_OR_SDPA = [
    *(pytest.param(kind, "eager", id=f"{kind}-eager") for kind in BACKBONES),
    *(pytest.param(kind, "sdpa", id=f"{kind}-sdpa") for kind in NO_SINKS),
]
ROUNDING = {"eager": 5e-6, "sdpa": 1e-10}  # of logits: the softmax of eager attention is float32, even in float64
WEIGHT = {"token": lambda x: 1.0, "sample": lambda x: 1 / x, "square": lambda x: x**-0.5}


def make_model(kind: str, attention: str = "eager", **changes: Any) -> InternVLChatModel:
    """A tiny model in float64, in training mode (nothing in it is random)."""
    set_seed(0)
    model = InternVLChatModel(chat_config(llm_config=llm_dict(kind, **changes))).double().train()
    model.language_model.set_attn_implementation(attention)
    if kind in EXPERTS:
        model.language_model.set_experts_implementation("eager")  # grouped kernels know no float64
    return model


def make_rows() -> list[Row]:
    """Pictures and text in turn, one row of one token, one without labels, one learned from its first token on."""
    generator, rows = torch.Generator().manual_seed(0), []
    for tiles, words, first_label in ((2, 9, 12), (0, 14, 0), (0, 1, 0), (1, 7, 99), (0, 21, 4), (1, 5, 8)):
        text = torch.randint(20, 400, (words,), generator=generator)
        ids = torch.cat([torch.full((4 * tiles,), CONTEXT), text])
        labels = torch.where(torch.arange(len(ids)) >= first_label, ids, -100)
        pixels = torch.randn(tiles, 3, 56, 56, generator=generator, dtype=torch.float64) if tiles else None
        rows.append({"input_ids": ids, "labels": labels, "pixel_values": pixels})
    return rows


def pack(rows: list[Row], reduction: str = "square", packing: bool = True) -> dict[str, Any]:
    batch = InternVLCollator(2, 56, reduction, packing)(rows)
    return {**batch, "pixel_values": batch["pixel_values"].double()}


def alone(model: InternVLChatModel, row: Row) -> torch.Tensor:
    """(L, V) logits of a row by itself."""
    return model(input_ids=row["input_ids"][None], pixel_values=row["pixel_values"], use_cache=False).logits[0]


def reference_loss(model: InternVLChatModel, rows: list[Row], reduction: str) -> torch.Tensor:
    """Sum of weight x cross-entropy / sum of weights, row by row."""
    total, weights = 0.0, 0.0
    for row in rows:
        targets = row["labels"][1:]
        supervised = int((row["labels"] != -100).sum())
        weight = WEIGHT[reduction](supervised) if supervised else 0.0
        total = total + weight * F.cross_entropy(alone(model, row)[:-1], targets, reduction="sum")
        weights += weight * int((targets != -100).sum())
    return total / weights


def assert_same_training(model: InternVLChatModel, rows: list[Row], reduction: str) -> None:
    """The model takes its loss from float32 logits, hence the tolerances."""
    expected = reference_loss(model, rows, reduction)
    expected.backward()
    reference = gradients(model)
    loss = model(**pack(rows, reduction)).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    found = gradients(model)
    assert found.keys() == reference.keys() == dict(model.named_parameters()).keys()
    for name, gradient in reference.items():
        assert (found[name] - gradient).abs().max() <= 2e-6 * gradient.abs().max() + 1e-12, name


def assert_same_logits(model: InternVLChatModel, rows: list[Row], **changes: Any) -> None:
    batch = {**pack(rows), **changes}
    packed = model(**batch, output_logits=True).logits[0].split([len(row["input_ids"]) for row in rows])
    tolerance = ROUNDING[model.language_model.config._attn_implementation]
    for row, logits in zip(rows, packed, strict=True):
        torch.testing.assert_close(logits, alone(model, row), rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------------------- loss and gradients


@pytest.mark.parametrize("reduction", WEIGHT)
@pytest.mark.parametrize(("kind", "attention"), EAGER_OR_SDPA)
def test_loss_and_gradients_are_those_of_rows_alone(kind: str, attention: str, reduction: str) -> None:
    assert_same_training(make_model(kind, attention), make_rows(), reduction)


@pytest.mark.parametrize(("kind", "attention"), [pair for pair in EAGER_OR_SDPA if pair.values[0] in SLIDING])
def test_window_shorter_than_a_row(kind: str, attention: str) -> None:
    model, rows = make_model(kind, attention, **SLIDING[kind]), make_rows()
    assert_same_training(model, rows, "square")
    assert_same_logits(model, rows)
    with torch.no_grad():
        wide = alone(make_model(kind, attention, **dict.fromkeys(SLIDING[kind], 64)), rows[4])
        assert not torch.allclose(alone(model, rows[4]), wide, atol=1e-3)  # the window does something


@pytest.mark.parametrize(("kind", "window"), [*((kind, False) for kind in NO_SINKS), ("phi3", True)])
def test_attention_row_by_row(kind: str, window: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the trainer runs packs: no mask of the whole pack is ever made, nor looked at."""
    model, rows = make_model(kind, "sdpa", **(SLIDING[kind] if window else {})), make_rows()
    with torch.no_grad():
        expected = torch.cat([alone(model, row) for row in rows])
    with attention_by_row(model.language_model) as active:
        assert active and model.language_model.config._attn_implementation == "sdpa_by_row"
        assert_same_training(model, rows, "square")
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        assert_same_training(model, rows, "square")
        model.gradient_checkpointing_disable()
        with torch.no_grad():
            torch.testing.assert_close(torch.cat([alone(model, row) for row in rows]), expected, rtol=0, atol=1e-10)
            with monkeypatch.context() as patch:
                patch.setattr("internvl_hub.modeling_internvl_chat.create_masks_for_generate", None)
                packed = model(**pack(rows), output_logits=True).logits[0]
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-10)
    assert model.language_model.config._attn_implementation == "sdpa"
    assert len(model.language_model.get_decoder()._forward_pre_hooks) == 1


@pytest.mark.parametrize("kind", NO_SINKS)
def test_answers_during_training_stay_the_same(kind: str) -> None:
    """Evaluation generates while packs are attended to row by row."""
    model, row = make_model(kind, "sdpa").eval(), make_rows()[0]
    inputs = {"input_ids": row["input_ids"][None].repeat(2, 1), "pixel_values": row["pixel_values"].repeat(2, 1, 1, 1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**inputs, **settings)
    with attention_by_row(model.language_model):
        assert torch.equal(model.generate(**inputs, **settings), expected)


def test_only_sdpa_is_replaced() -> None:
    model = make_model("gpt_oss", "eager")
    with attention_by_row(model.language_model) as active:
        assert not active and model.language_model.config._attn_implementation == "eager"


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe"])
def test_gradient_checkpointing(kind: str) -> None:
    model = make_model(kind, "sdpa")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing
    assert_same_training(model, make_rows(), "square")


def test_one_row_is_the_mean_cross_entropy_of_transformers() -> None:
    model, row = make_model("qwen2", "sdpa"), make_rows()[4]
    ids, labels = row["input_ids"][None], row["labels"][None]
    assert model(**pack([row], "token")).loss.item() == pytest.approx(
        model.language_model(input_ids=ids, labels=labels, use_cache=False).loss.item(), rel=1e-6
    )


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", BACKBONES)
def test_filler_trains_nothing_and_misses_nothing(kind: str, packing: bool) -> None:
    """Gradients of zero, not missing ones, so that ranks reduce the same tensors."""
    model = make_model(kind)
    loss = model(**pack([], packing=packing), num_items_in_batch=torch.tensor(3.0)).loss
    loss.backward()
    assert loss.item() == 0
    found = gradients(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert not any(torch.count_nonzero(gradient) for gradient in found.values())


# ------------------------------------------------------------------------------------------------------------ backends


@pytest.mark.parametrize(("kind", "attention"), EAGER_OR_SDPA)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@torch.no_grad()
def test_logits(kind: str, attention: str, training: bool) -> None:
    assert_same_logits(make_model(kind, attention).train(training), make_rows())


@pytest.mark.parametrize("kind", NO_SINKS)
@torch.no_grad()
def test_logits_on_flex_attention(kind: str) -> None:
    """Not compiled and forward only: there is no more of it on a CPU."""
    changes = SLIDING.get(kind, {})
    model, reference, rows = (
        make_model(kind, "flex_attention", **changes),
        make_model(kind, "sdpa", **changes),
        make_rows(),
    )
    batch = pack(rows)
    with torch.compiler.set_stance("force_eager"):
        packed = model(**batch, output_logits=True).logits[0]
    expected = torch.cat([alone(reference, row) for row in rows])
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-10)


def _varlen(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What variable-length flash attention computes, from the same arguments, segment by segment."""
    assert attention_mask is None and torch.equal(cu_seq_lens_q, cu_seq_lens_k) and query.shape[0] == 1
    lengths = cu_seq_lens_q.diff().tolist()
    assert max_length_q == max_length_k == max(lengths) and sum(lengths) == query.shape[2]
    groups, parts = query.shape[1] // key.shape[1], []
    for q, k, v in zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True):
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        seen = (distance >= 0) & (distance < (sliding_window or q.shape[2]))
        scores = (q @ k.transpose(-1, -2) * scaling).masked_fill(~seen, -torch.inf)
        parts.append(scores.softmax(-1) @ v)
    return torch.cat(parts, dim=2).transpose(1, 2), None


@pytest.mark.parametrize("kind", NO_SINKS)
@torch.no_grad()
def test_lengths_for_flash_attention_arrive_and_suffice(kind: str) -> None:
    """Flash attention itself needs a GPU; this has its inputs, and nothing else to tell rows apart by."""
    AttentionInterface.register("varlen_reference", _varlen)
    AttentionMaskInterface.register("varlen_reference", lambda *args, **kwargs: None)
    changes = SLIDING.get(kind, {})
    model, reference, rows = make_model(kind, **changes), make_model(kind, "sdpa", **changes), make_rows()
    model.language_model.set_attn_implementation("varlen_reference")
    expected = torch.cat([alone(reference, row) for row in rows])
    packed = model(**pack(rows), output_logits=True).logits[0]
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-10)


# ----------------------------------------------------------------------------------------------------------- isolation


def _change_ids(row: Row) -> Row:
    ids = torch.where(row["input_ids"] == CONTEXT, CONTEXT, (row["input_ids"] + 7) % 380 + 20)
    return {**row, "input_ids": ids}


def _change_picture(row: Row) -> Row:
    return {**row, "pixel_values": row["pixel_values"] + 1}


@pytest.mark.parametrize("change", [_change_ids, _change_picture], ids=["ids", "picture"])
@pytest.mark.parametrize(("kind", "attention"), EAGER_OR_SDPA)
@torch.no_grad()
def test_another_row_leaves_logits_as_they_are(kind: str, attention: str, change: Callable) -> None:
    """To the bit; where experts run, other tokens make other matrices, so only to rounding."""
    model, rows = make_model(kind, attention), make_rows()
    lengths = [len(row["input_ids"]) for row in rows]
    before = model(**pack(rows), output_logits=True).logits[0].split(lengths)
    changed = [*rows[:3], change(rows[3]), *rows[4:]]
    after = model(**pack(changed), output_logits=True).logits[0].split(lengths)
    tolerance = 1e-11 if kind in EXPERTS else 0
    for i, (left, right) in enumerate(zip(before, after, strict=True)):
        if i == 3:
            assert not torch.allclose(left, right, atol=1e-3)
        else:
            torch.testing.assert_close(left, right, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "changes",
    [{"use_cache": None}, {"position_ids": None}, {"attention_mask": "ones"}],
    ids=["cache", "positions", "mask"],
)
@torch.no_grad()
def test_what_the_collator_sets_is_needed(changes: dict[str, Any]) -> None:
    """With a cache, positions that run on, or a mask, transformers takes a pack for one row, and says nothing."""
    model, rows = make_model("qwen2", "sdpa").eval(), make_rows()
    if changes.get("attention_mask") == "ones":
        changes = {"attention_mask": torch.ones_like(pack(rows)["input_ids"])}
    with pytest.raises(AssertionError, match="not close"):
        assert_same_logits(model, rows, **changes)


# ------------------------------------------------------------------------------------------------------- router's loss


def test_router_loss_is_that_of_the_padded_batch() -> None:
    """The balancing loss of experts is a statistic of all tokens of a micro-batch, not a sum over rows: a pack has
    that of the padded batch of its rows, and neither has the mean of rows alone."""
    model, rows = make_model("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.5), make_rows()
    results = []
    for packing in (True, False):
        outputs = model(**pack(rows, packing=packing))
        outputs.loss.backward()
        results.append((outputs.loss.item(), gradients(model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert_same(results[0][1], results[1][1], rtol=1e-5, atol=1e-8)
    plain = make_model("qwen3_moe")(**pack(rows)).loss.item()
    shares = [(results[0][0] - plain) / 0.5]
    shares += [model.language_model(input_ids=row["input_ids"][None]).aux_loss.item() for row in rows[1:5:3]]
    assert shares[0] > 1 and len({round(share, 3) for share in shares}) == 3
