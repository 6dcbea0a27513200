"""The model against reference numbers, and how images, text and their mixtures go through it.

Losses, generation, loading and other language models have files of their own.
"""

from typing import Any

import pytest
import torch
from tiny import (
    CHECKPOINTS,
    CONTEXT,
    END_OF_TURN,
    LLAMA,
    QWEN2,
    assert_same,
    batch,
    by_hand,
    chat_config,
    expected,
    gradients,
    load,
    record,
    vision_dict,
)
from torch import nn

from internvl_hub.modeling_internvl_chat import InternVLChatModel, VisualTokenMismatchError, pixel_shuffle

EACH = pytest.mark.parametrize("name", CHECKPOINTS)


@pytest.fixture
def qwen2() -> InternVLChatModel:
    """A fresh copy of the Qwen2 checkpoint."""
    return load(QWEN2)


# --------------------------------------------------------------------------------------------------- reference numbers


@EACH
@torch.no_grad()
def test_features_and_logits_are_the_reference(name: str) -> None:
    model, reference, inputs = load(name), expected(name), batch(name, labels=False)
    close = {"rtol": 1e-4, "atol": 1e-5}
    features = model.extract_feature(inputs["pixel_values"])
    torch.testing.assert_close(features, reference["extract_feature"], **close)
    torch.testing.assert_close(model.get_image_features(inputs["pixel_values"]).pooler_output, features)
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[seen], reference["forward.logits"][seen], **close)


@EACH
@pytest.mark.parametrize("training", [True, False])
def test_losses_are_the_reference(name: str, training: bool) -> None:
    model, inputs, losses = load(name).train(training), batch(name), record(name)
    counts = (inputs["labels"] != -100).sum(1, keepdim=True)
    weights = {"token": torch.ones(2, 1), "sample": 1 / counts, "square": counts**-0.5}
    assert model(**inputs).loss.item() == pytest.approx(losses["loss.mean_over_tokens"], rel=1e-5)
    for reduction, weight in weights.items():
        loss = model(**inputs, loss_weight=weight.expand_as(inputs["labels"])).loss
        assert loss.item() == pytest.approx(losses[f"loss.{reduction}"], rel=1e-5), reduction


@EACH
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_ids_are_the_reference(name: str, use_cache: bool) -> None:
    model, tensors = load(name), expected(name)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": END_OF_TURN[name], "use_cache": use_cache}
    for k, case in enumerate(record(name)["cases"]):
        ids, pixels = torch.tensor([case["prompt_ids"]]), tensors.get(f"chat.{k}.pixel_values")
        output = model.generate(input_ids=ids, pixel_values=pixels, **options)
        assert output[0].tolist() == case["prompt_ids"] + case["new_token_ids"], k


@EACH
@torch.no_grad()
def test_greedy_ids_from_whole_sequences_are_the_reference(name: str) -> None:
    """With images transformers always uses a cache; here every step runs the whole sequence without one."""
    model, tensors = load(name), expected(name)
    for k, case in enumerate(record(name)["cases"]):
        embeds = model.embed_prompt(torch.tensor([case["prompt_ids"]]), tensors.get(f"chat.{k}.pixel_values"))
        for token in case["new_token_ids"]:
            logits = model(inputs_embeds=embeds, use_cache=False).logits[:, -1]
            assert logits.argmax(-1).item() == token, k
            embeds = torch.cat([embeds, model.get_input_embeddings()(logits.argmax(-1, keepdim=True))], dim=1)


# ------------------------------------------------------------------------------------------------------- pixel shuffle


@pytest.mark.parametrize(("version", "transposed"), [("v1", True), ("v2", False)])
def test_pixel_shuffle_is_its_formula(version: str, transposed: bool) -> None:
    """Cell (r, q) concatenates sources (2r, 2q), (2r, 2q+1), (2r+1, 2q), (2r+1, 2q+1); v1 exchanges r and q."""
    features = torch.arange(2 * 8 * 8 * 3).view(2, 8, 8, 3)
    shuffled = pixel_shuffle(features, 0.5, version)
    assert shuffled.shape == (2, 4, 4, 12) and shuffled.is_contiguous()
    for r in range(4):
        for q in range(4):
            corners = [(2 * r, 2 * q), (2 * r, 2 * q + 1), (2 * r + 1, 2 * q), (2 * r + 1, 2 * q + 1)]
            vector = torch.cat([features[:, a, b] for a, b in corners], dim=-1)
            assert torch.equal(shuffled[:, q, r] if transposed else shuffled[:, r, q], vector)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_pixel_shuffle_has_an_inverse(version: str) -> None:
    features = torch.randn(2, 8, 8, 3)
    shuffled = pixel_shuffle(features, 0.5, version)
    if version == "v1":
        shuffled = shuffled.transpose(1, 2)
    back = shuffled.reshape(2, 4, 4, 2, 2, 3).permute(0, 1, 3, 2, 4, 5).reshape(2, 8, 8, 3)
    assert torch.equal(back, features)


def test_pixel_shuffle_by_four() -> None:
    features = torch.arange(16).view(1, 4, 4, 1)
    assert pixel_shuffle(features, 0.25, "v2").shape == (1, 1, 1, 16)
    assert sorted(pixel_shuffle(features, 0.25, "v2").flatten().tolist()) == list(range(16))


# ----------------------------------------------------------------------------------------------------- text and images


@EACH
@torch.no_grad()
def test_text_alone_is_the_bare_language_model(name: str) -> None:
    model, ids = load(name), torch.randint(20, 400, (2, 9))
    assert torch.equal(model(input_ids=ids).logits, model.language_model(input_ids=ids).logits)


@torch.no_grad()
def test_features_are_written_in_order(qwen2: InternVLChatModel) -> None:
    inputs = batch(QWEN2, labels=False)
    features = expected(QWEN2)["extract_feature"]
    embeds = qwen2.embed_prompt(inputs["input_ids"], inputs["pixel_values"])
    torch.testing.assert_close(embeds, by_hand(qwen2, inputs["input_ids"], features), rtol=1e-4, atol=1e-5)


@EACH
@torch.no_grad()
def test_mixed_batch_equals_its_rows_alone(name: str) -> None:
    """Two tiles, one tile, none: right padded together, or each by itself."""
    model, inputs = load(name), batch(name, labels=False)
    text = torch.tensor([[3, 40, 50, 60, 4] + [2] * 13])
    ids = torch.cat([inputs["input_ids"], text])
    mask = torch.cat([inputs["attention_mask"], (text != 2).long()])
    together = model(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"]).logits
    tiles = [inputs["pixel_values"][:2], inputs["pixel_values"][2:], None]
    for row, pixels in enumerate(tiles):
        length = int(mask[row].sum())
        alone = model(input_ids=ids[row : row + 1, :length], pixel_values=pixels).logits[0]
        torch.testing.assert_close(together[row, :length], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("flat", [True, False])
def test_ready_features_equal_pixels(qwen2: InternVLChatModel, flat: bool) -> None:
    inputs = batch(QWEN2)
    reference = qwen2(**inputs)
    features = qwen2.extract_feature(inputs.pop("pixel_values"))
    output = qwen2(**inputs, visual_features=features.flatten(0, 1) if flat else features)
    assert torch.equal(output.logits, reference.logits) and torch.equal(output.loss, reference.loss)


@torch.no_grad()
def test_embeddings_as_input(qwen2: InternVLChatModel) -> None:
    inputs = batch(QWEN2)
    reference = qwen2(**inputs)
    embeds = qwen2.embed_prompt(inputs.pop("input_ids"), inputs.pop("pixel_values"))
    assert torch.equal(qwen2(inputs_embeds=embeds, **inputs).logits, reference.logits)


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
@torch.no_grad()
def test_image_flags_choose_tiles(qwen2: InternVLChatModel, shape: tuple[int, ...]) -> None:
    """The second of three tiles is a dummy: the result is that of the other two alone."""
    ids = torch.tensor([[3, *[CONTEXT] * 8, 40, 4]])
    pixels = expected(QWEN2)["pixel_values"]
    flagged = qwen2(input_ids=ids, pixel_values=pixels, image_flags=torch.tensor([1, 0, 1]).view(shape)).logits
    torch.testing.assert_close(flagged, qwen2(input_ids=ids, pixel_values=pixels[[0, 2]]).logits)


def test_image_flags_must_fit_the_tiles(qwen2: InternVLChatModel) -> None:
    with pytest.raises(ValueError, match="image_flags has 2 entries for 3 tiles"):
        qwen2(**batch(QWEN2), image_flags=torch.tensor([1, 1]))


@pytest.mark.parametrize("flags", [torch.tensor([0]), torch.tensor([[0]]), [0]], ids=["1d", "2d", "list"])
def test_dummy_tile_changes_nothing_but_keeps_the_encoder_in_the_graph(qwen2: InternVLChatModel, flags: Any) -> None:
    """Gradients are zero, not None: a text-only rank then takes part in every collective of the others."""
    ids = torch.tensor([[3, 40, 50, 60, 4]])
    text = qwen2.train()(input_ids=ids, labels=ids).loss
    loss = qwen2(input_ids=ids, labels=ids, pixel_values=torch.randn(1, 3, 56, 56), image_flags=flags).loss
    assert torch.equal(loss, text)
    loss.backward()
    parameters = [*qwen2.vision_model.parameters(), *qwen2.mlp1.parameters()]
    assert all(p.grad is not None and not p.grad.any() for p in parameters)
    assert qwen2.get_input_embeddings().weight.grad.any()


@EACH
def test_tile_index_shares_what_repeated_tiles_compute_twice(name: str) -> None:
    """Two rows about one image of two tiles, then one about the third tile alone: values and gradients."""
    model, pixels = load(name).double(), expected(name)["pixel_values"].double()
    row = [3, *[CONTEXT] * 8, 40, 4]
    ids = torch.tensor([row, [*row[:-2], 41, 5], [3, *[CONTEXT] * 4, 42, 4, *[2] * 4]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 2).long(), "labels": ids.masked_fill(ids == 2, -100)}
    twice = model(**inputs, pixel_values=pixels[[0, 1, 0, 1, 2]])
    twice.loss.backward()
    expected_gradients = gradients(model)
    once = model(**inputs, pixel_values=pixels, tile_index=torch.tensor([0, 1, 0, 1, 2]))
    once.loss.backward()
    torch.testing.assert_close(once.logits, twice.logits)
    assert_same(gradients(model), expected_gradients, rtol=1e-4, atol=1e-8)  # norms compute in float32
    with torch.no_grad():
        features = model(**inputs, visual_features=model.extract_feature(pixels), tile_index=[0, 1, 0, 1, 2])
        embeds = model.base_model(ids, pixel_values=pixels, tile_index=[0, 1, 0, 1, 2])
    torch.testing.assert_close(features.logits, twice.logits)
    torch.testing.assert_close(model.lm_head(embeds.last_hidden_state[0]), twice.logits[0])


def test_tiles_without_a_place_keep_the_encoder_in_the_graph(qwen2: InternVLChatModel) -> None:
    ids = torch.tensor([[3, 40, 50, 60, 4]])
    nowhere = torch.zeros(0, dtype=torch.long)
    loss = qwen2.train()(input_ids=ids, labels=ids, pixel_values=torch.randn(1, 3, 56, 56), tile_index=nowhere).loss
    assert torch.equal(loss, qwen2(input_ids=ids, labels=ids).loss)
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in qwen2.vision_model.parameters())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tile_index": [0, 1, 3]}, "tile_index names tiles 0 to 3 of 3"),
        ({"tile_index": [-1, 1, 2]}, "tile_index names tiles -1 to 2 of 3"),
        ({"tile_index": [0, 1]}, "12 <IMG_CONTEXT>.*8 visual"),
        ({"tile_index": [0, 1, 2], "image_flags": torch.ones(3)}, "no image_flags"),
    ],
)
def test_tile_index_must_fit_the_tiles(qwen2: InternVLChatModel, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        qwen2(**batch(QWEN2), **changes)


# ---------------------------------------------------------------------------------------------------------- mismatches


@pytest.mark.parametrize("call", ["forward", "generate", "base_model"])
@pytest.mark.parametrize(("slots", "tiles", "rows"), [(7, 2, 8), (4, 2, 8), (0, 1, 4), (3, 0, 0)])
def test_mismatch_names_both_counts(qwen2: InternVLChatModel, call: str, slots: int, tiles: int, rows: int) -> None:
    ids = torch.tensor([[3, *[CONTEXT] * slots, 40, 4]])
    pixels = torch.randn(tiles, 3, 56, 56) if tiles else None
    with pytest.raises(VisualTokenMismatchError, match=rf"{slots} <IMG_CONTEXT> token.* {rows} visual feature"):
        getattr(qwen2, call)(input_ids=ids, pixel_values=pixels)


@pytest.mark.parametrize("shape", [(3, 56, 56), (1, 3, 28, 56), (1, 3, 112, 112), (1, 1, 3, 56, 56)])
@pytest.mark.parametrize("call", ["extract_feature", "forward", "generate"])
def test_wrong_pixels_are_named(qwen2: InternVLChatModel, shape: tuple[int, ...], call: str) -> None:
    inputs = {} if call == "extract_feature" else {"input_ids": torch.tensor([[3, *[CONTEXT] * 4, 4]])}
    with pytest.raises(ValueError, match=r"pixel_values has shape .*expected \(tiles, 3, 56, 56\)"):
        getattr(qwen2, call)(pixel_values=torch.zeros(shape), **inputs)


def test_exactly_one_of_ids_and_embeddings(qwen2: InternVLChatModel) -> None:
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        qwen2()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        qwen2(input_ids=torch.tensor([[3]]), inputs_embeds=torch.zeros(1, 1, 48))


def test_unknown_context_token(qwen2: InternVLChatModel) -> None:
    qwen2.img_context_token_id = None
    inputs = batch(QWEN2)
    with pytest.raises(ValueError, match="set model.img_context_token_id"):
        qwen2(**inputs)
    assert qwen2(input_ids=torch.tensor([[3, 40, 4]])).logits.shape == (1, 3, 420)


def test_context_token_from_script_and_configuration(qwen2: InternVLChatModel) -> None:
    qwen2.img_context_token_id = 12
    assert qwen2.config.img_context_token_id == 12
    assert InternVLChatModel(chat_config(img_context_token_id=9)).img_context_token_id == 9


# --------------------------------------------------------------------------------------------------------- model parts


def test_embeddings_can_be_replaced(qwen2: InternVLChatModel) -> None:
    table, head = nn.Embedding(430, 48), nn.Linear(48, 430, bias=False)
    qwen2.set_input_embeddings(table)
    qwen2.set_output_embeddings(head)
    assert qwen2.get_input_embeddings() is table and qwen2.language_model.model.embed_tokens is table
    assert qwen2.get_output_embeddings() is head and qwen2.lm_head is head and qwen2.language_model.lm_head is head


@EACH
@torch.no_grad()
def test_base_model_view_is_the_model_without_its_head(name: str) -> None:
    model, inputs = load(name), batch(name, labels=False)
    hidden = model.base_model(**inputs).last_hidden_state
    assert torch.equal(model.lm_head(hidden), model(**inputs).logits)
    assert model.base_model.config is model.config
    assert not [key for key in model.state_dict() if key.startswith("base_model")]


@torch.no_grad()
def test_logits_to_keep(qwen2: InternVLChatModel) -> None:
    inputs = batch(QWEN2)
    full = qwen2(**inputs)
    index = torch.tensor([1, 5])
    labels = inputs.pop("labels")
    for keep, logits in ((3, full.logits[:, -3:]), (index, full.logits[:, index]), (0, full.logits)):
        torch.testing.assert_close(qwen2(**inputs, logits_to_keep=keep).logits, logits)
        with_loss = qwen2(**inputs, labels=labels, logits_to_keep=keep)
        torch.testing.assert_close(with_loss.logits, logits)
        torch.testing.assert_close(with_loss.loss, full.loss)


@torch.no_grad()
def test_other_outputs(qwen2: InternVLChatModel) -> None:
    inputs = batch(QWEN2)
    output = qwen2(**inputs, output_hidden_states=True, return_dict=True)
    assert len(output.hidden_states) == 1 + qwen2.config.llm_config.num_hidden_layers
    assert output.past_key_values.get_seq_length() == 18
    loss, logits = qwen2(**inputs, return_dict=False)[:2]
    assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)


@torch.no_grad()
def test_select_layer_takes_the_hidden_state_of_that_index() -> None:
    """-1 is the encoder's output, index 0 its embeddings."""
    pixels = expected(LLAMA)["pixel_values"]
    for layer in (-4, 0, -1):
        model = load(LLAMA)
        model.select_layer = layer
        states = model.vision_model(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]
        grid = pixel_shuffle(states.reshape(3, 4, 4, -1), 0.5, "v1")
        torch.testing.assert_close(model.extract_feature(pixels), model.mlp1(grid.reshape(3, 4, -1)))


@torch.no_grad()
def test_other_downsample_ratio() -> None:
    model = InternVLChatModel(chat_config(downsample_ratio=0.25)).eval()
    assert model.num_image_token == 1
    assert model.mlp1[1].in_features == 16 * vision_dict()["hidden_size"]
    assert model.extract_feature(torch.randn(2, 3, 56, 56)).shape == (2, 1, 32)


def test_towers_can_be_composed() -> None:
    parts = InternVLChatModel(chat_config())
    model = InternVLChatModel(chat_config(), vision_model=parts.vision_model, language_model=parts.language_model)
    assert model.vision_model is parts.vision_model and model.language_model is parts.language_model
    assert_same(model.language_model.state_dict(), parts.language_model.state_dict())


# --------------------------------------------------------------------------------------------------------- compilation


@torch.no_grad()
def test_compiled_forward_equals_eager(qwen2: InternVLChatModel) -> None:
    inputs, text = batch(QWEN2, labels=False), {"input_ids": torch.tensor([[3, 40, 50, 4]])}
    compiled = torch.compile(qwen2, backend="eager")
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(compiled(**inputs).logits[seen], qwen2(**inputs).logits[seen])
    torch.testing.assert_close(compiled(**text).logits, qwen2(**text).logits)
