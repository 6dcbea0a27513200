"""The training loss: chunks, weights and normalisers against plain cross-entropy over full logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import CHECKPOINTS, QWEN2, assert_same, batch, chat_config, gradients, llm_dict, load
from versions import CHECKPOINTING

from internvl_hub import losses_internvl
from internvl_hub.losses_internvl import head_cross_entropy_sum, length_to_weight, shift_targets
from internvl_hub.modeling_internvl_chat import InternVLChatModel

EACH = pytest.mark.parametrize("name", CHECKPOINTS)
WEIGHTS = torch.linspace(0.2, 3.0, 36).view(2, 18)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of logits to a chunk: the nine labels of the reference batch need five."""
    monkeypatch.setattr(losses_internvl, "MAX_CHUNK_LOGITS", 2 * 420 + 1)


@pytest.fixture
def model() -> InternVLChatModel:
    """The Qwen2 checkpoint, training."""
    return load(QWEN2).train()


def _reference(model: InternVLChatModel, inputs: dict[str, Any], weights: torch.Tensor | None = None) -> torch.Tensor:
    """Mean cross-entropy from full logits, in the plainest way."""
    inputs = dict(inputs)
    labels = inputs.pop("labels")[:, 1:].flatten()
    logits = model(**inputs).logits[:, :-1].flatten(0, 1)
    losses = F.cross_entropy(logits, labels, reduction="none")
    weights = torch.ones_like(losses) if weights is None else weights[:, 1:].flatten()
    weights = weights * (labels != -100)
    return (losses * weights).sum() / weights.sum()


def _rows_through_head(model: InternVLChatModel) -> list[int]:
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[:-1].numel()))
    return rows


# -------------------------------------------------------------------------------------------------------- chunked loss


@EACH
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_chunked_loss_and_gradients_equal_full_logits(
    name: str, weights: torch.Tensor | None, small_chunks: None
) -> None:
    model, inputs = load(name).train(), batch(name)
    reference = _reference(model, inputs, weights)
    reference.backward()
    reference_gradients = gradients(model)
    output = model(**inputs, loss_weight=weights)
    output.loss.backward()
    assert output.logits is None
    torch.testing.assert_close(output.loss, reference, rtol=1e-6, atol=1e-6)
    assert_same(gradients(model), reference_gradients, rtol=1e-4, atol=1e-6)


def test_only_supervised_rows_reach_the_head_in_chunks(model: InternVLChatModel, small_chunks: None) -> None:
    rows = _rows_through_head(model)
    model(**batch(QWEN2)).loss.backward()
    assert rows[:5] == [2, 2, 2, 2, 1]
    assert sorted(rows[5:]) == [1, 2, 2, 2, 2]  # and once again in the backward pass


def test_a_small_batch_is_one_chunk(model: InternVLChatModel) -> None:
    rows = _rows_through_head(model)
    model(**batch(QWEN2)).loss.backward()
    assert rows == [9]


@EACH
def test_training_loss_equals_evaluation_loss(name: str) -> None:
    model, inputs = load(name), batch(name)
    evaluated = model(**inputs, loss_weight=WEIGHTS)
    trained = model.train()(**inputs, loss_weight=WEIGHTS)
    torch.testing.assert_close(trained.loss, evaluated.loss, rtol=1e-6, atol=1e-6)
    assert evaluated.logits.shape == (2, 18, 420)


@pytest.mark.parametrize(
    ("training", "asked", "given"), [(True, True, True), (True, None, False), (False, False, False)]
)
def test_logits_beside_a_loss_are_a_choice(
    model: InternVLChatModel, training: bool, asked: bool | None, given: bool
) -> None:
    output = model.train(training)(**batch(QWEN2), output_logits=asked)
    assert (output.logits is not None) == given
    torch.testing.assert_close(output.loss, _reference(model, batch(QWEN2)), rtol=1e-6, atol=1e-6)


@EACH
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    model, inputs = load(name).train(), batch(name)
    plain_loss = model(**inputs).loss
    plain_loss.backward()
    plain = gradients(model)
    getattr(model, f"{CHECKPOINTING}_enable")()
    assert getattr(model, f"is_{CHECKPOINTING}")
    assert model.vision_model.encoder.layers[0].gradient_checkpointing
    assert model.language_model.get_decoder().layers[0].gradient_checkpointing
    loss = model(**inputs).loss
    loss.backward()
    torch.testing.assert_close(loss, plain_loss)
    assert_same(gradients(model), plain, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------------------- normalisers


@pytest.mark.parametrize("items", [5, 5.0, torch.tensor(5), torch.tensor(5.0)])
def test_number_of_items_replaces_the_own_count(model: InternVLChatModel, items: Any) -> None:
    """Nine labels in this batch, five items in the global one: sum / 5."""
    inputs = batch(QWEN2)
    expected = _reference(model, inputs) * 9 / 5
    torch.testing.assert_close(model(**inputs, num_items_in_batch=items).loss, expected, rtol=1e-5, atol=1e-6)
    evaluated = model.eval()(**inputs, num_items_in_batch=items).loss
    torch.testing.assert_close(evaluated, expected, rtol=1e-5, atol=1e-6)


def test_micro_batches_add_up_to_the_batch(model: InternVLChatModel, small_chunks: None) -> None:
    """Two rows one by one with the sum of weights of both, or together: same loss, same gradients."""
    inputs, weights = batch(QWEN2), WEIGHTS
    model(**inputs, loss_weight=weights).loss.backward()
    together = gradients(model)
    total = (weights[:, 1:] * (inputs["labels"][:, 1:] != -100)).sum()
    pixels = inputs.pop("pixel_values")
    for row, tiles in enumerate((pixels[:2], pixels[2:])):
        part = {key: tensor[row : row + 1] for key, tensor in inputs.items()}
        part |= {"loss_weight": weights[row : row + 1], "num_items_in_batch": total}
        model(**part, pixel_values=tiles).loss.backward()
    assert_same(gradients(model), together, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "convert", [torch.Tensor.tolist, torch.Tensor.double, lambda w: w], ids=["list", "f64", "f32"]
)
def test_weights_may_be_lists(model: InternVLChatModel, convert: Callable[[torch.Tensor], Any]) -> None:
    """The original collator passes lists, which autocast leaves alone."""
    loss = model(**batch(QWEN2), loss_weight=convert(WEIGHTS)).loss
    torch.testing.assert_close(loss, _reference(model, batch(QWEN2), WEIGHTS), rtol=1e-6, atol=1e-6)


def test_weights_scale_out(model: InternVLChatModel) -> None:
    loss = model(**batch(QWEN2), loss_weight=WEIGHTS).loss
    torch.testing.assert_close(model(**batch(QWEN2), loss_weight=7 * WEIGHTS).loss, loss)


def test_head_runs_in_float32_cross_entropy() -> None:
    """A bfloat16 head: the cross-entropy of its logits is taken in float32."""
    states, head = torch.randn(6, 8).bfloat16(), torch.nn.Linear(8, 50).bfloat16()
    targets = shift_targets(torch.randint(0, 50, (1, 7)))
    loss = head_cross_entropy_sum(states, head, targets, 50)
    assert loss.dtype == torch.float32
    logits = head(states).double()
    picked = logits.log_softmax(-1).gather(1, targets.labels[:, None])
    assert loss.item() == pytest.approx(-picked.sum().item(), rel=1e-5)


@pytest.mark.parametrize(("reduction", "weight"), [("token", 1.0), ("sample", 0.25), ("square", 0.5)])
def test_length_to_weight(reduction: str, weight: float) -> None:
    assert length_to_weight(4, reduction) == weight
    assert length_to_weight(0, reduction) == 0.0


# -------------------------------------------------------------------------------------------------- log-probabilities


def _log_probs(model: InternVLChatModel, inputs: dict[str, Any]) -> torch.Tensor:
    """Of every label, from full logits in the plainest way."""
    inputs = dict(inputs)
    labels = inputs.pop("labels")[:, 1:]
    logits = model(**inputs).logits[:, :-1].double().log_softmax(-1)
    return logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != -100]


@EACH
@pytest.mark.parametrize("training", [True, False])
def test_log_probabilities_of_the_labels(name: str, training: bool, small_chunks: None) -> None:
    model, inputs = load(name).train(training), batch(name)
    reference = _log_probs(model, inputs)
    weights = torch.linspace(-1, 2, len(reference))
    (reference * weights).sum().backward()
    reference_gradients = gradients(model)
    output = model(**inputs, output_log_probs=True)
    assert output.log_probs.dtype == torch.float32 and output.aux_loss is None and list(output) == ["log_probs"]
    (output.log_probs * weights).sum().backward()
    torch.testing.assert_close(output.log_probs, reference.float(), rtol=1e-5, atol=1e-5)
    assert_same(gradients(model), reference_gradients, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(-output.log_probs.mean(), model(**inputs).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite"])
def test_log_probabilities_where_logits_are_changed_behind_the_head(kind: str) -> None:
    model, inputs = InternVLChatModel(chat_config(kind)).eval(), batch(QWEN2)
    log_probs = model(**inputs, output_log_probs=True).log_probs
    torch.testing.assert_close(log_probs, _log_probs(model, inputs).float(), rtol=1e-5, atol=1e-5)


def test_log_probabilities_come_with_the_router_loss() -> None:
    text = llm_dict("qwen3_moe", output_router_logits=True)
    model, inputs = InternVLChatModel(chat_config(llm_config=text)).eval(), batch(QWEN2)
    output = model(**inputs, output_log_probs=True)
    torch.testing.assert_close(output.log_probs, _log_probs(model, inputs).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.aux_loss, model(**inputs).aux_loss)


def test_only_supervised_rows_are_scored(model: InternVLChatModel) -> None:
    rows = _rows_through_head(model)
    assert model(**batch(QWEN2), output_log_probs=True, return_dict=False)[0].shape == (9,)
    assert rows == [9]


def test_nothing_to_score_is_an_empty_answer(model: InternVLChatModel) -> None:
    inputs = {**batch(QWEN2), "labels": torch.full((2, 18), -100)}
    log_probs = model(**inputs, output_log_probs=True).log_probs
    assert log_probs.shape == (0,)
    log_probs.sum().backward()  # a rank without answers still takes part
    assert not model.mlp1[1].weight.grad.any()


def test_log_probabilities_need_labels(model: InternVLChatModel) -> None:
    with pytest.raises(ValueError, match="output_log_probs needs labels"):
        model(**batch(QWEN2, labels=False), output_log_probs=True)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("items", [9, torch.tensor(9)])
@pytest.mark.parametrize("training", [True, False])
def test_weights_with_a_count_of_tokens_are_refused(model: InternVLChatModel, items: Any, training: bool) -> None:
    with pytest.raises(ValueError, match="num_items_in_batch counts tokens.*sum of the weights"):
        model.train(training)(**batch(QWEN2), loss_weight=WEIGHTS, num_items_in_batch=items)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", [{"labels": torch.full((2, 18), -100)}, {"loss_weight": torch.zeros(2, 18)}])
def test_nothing_supervised_is_an_error(model: InternVLChatModel, training: bool, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no supervised token.*conversation template"):
        model.train(training)(**{**batch(QWEN2), **change})


def test_weights_of_another_shape_are_refused(model: InternVLChatModel) -> None:
    with pytest.raises(ValueError, match=r"loss_weight has shape \(2, 17\), labels have \(2, 18\)"):
        model(**batch(QWEN2), loss_weight=WEIGHTS[:, 1:])


def test_unknown_reduction_is_named() -> None:
    with pytest.raises(ValueError, match="'token', 'sample', 'square'.*'mean'"):
        length_to_weight(3, "mean")
