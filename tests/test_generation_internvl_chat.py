"""Generation with images: beams, several sequences, caches and padding, against transformers' bare language model.

The reference never sees an image: it gets embeddings put together by hand and generates on its own.
"""

from typing import Any

import pytest
import torch
from tiny import CHECKPOINTS, CONTEXT, END_OF_TURN, INTERNLM2, LLAMA, QWEN2, by_hand, load
from transformers import LogitsProcessor

from internvl_hub.modeling_internvl_chat import InternVLChatModel

EACH = pytest.mark.parametrize("name", CHECKPOINTS)
PROMPTS = ([3, 9, *[CONTEXT] * 8, 10, 40, 41, 4], [3, 9, *[CONTEXT] * 4, 10, 60, 4], [3, 70, 71, 4])
TILES = (2, 1, 0)


class Forced(LogitsProcessor):
    """Makes every sequence continue with the given tokens, whatever the model says."""

    def __init__(self, prompt_length: int, tokens: list[int]) -> None:
        self.prompt_length, self.tokens = prompt_length, tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_length
        if step < len(self.tokens):
            scores[:, self.tokens[step]] = 1e4
        return scores


@pytest.fixture
def qwen2() -> InternVLChatModel:
    """A fresh copy of the Qwen2 checkpoint."""
    return load(QWEN2)


def _options(name: str, **changes: Any) -> dict[str, Any]:
    fixed = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": END_OF_TURN[name], "pad_token_id": 2}
    return {**fixed, **changes}


def _rows() -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Each prompt with its tiles."""
    tiles = torch.randn(3, 3, 56, 56).split([2, 1])
    return [(torch.tensor([ids]), tiles[i] if i < 2 else None) for i, ids in enumerate(PROMPTS)]


def _left_padded() -> dict[str, torch.Tensor]:
    """All prompts in one batch, with the tiles of `_rows` of the same seed."""
    length = max(map(len, PROMPTS))
    ids = torch.tensor([[2] * (length - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in PROMPTS])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(3, 3, 56, 56)}


@torch.no_grad()
def _bare(model: InternVLChatModel, ids: torch.Tensor, pixels: torch.Tensor | None, **options: Any) -> list[list[int]]:
    """New tokens of one prompt, from the language model alone."""
    features = torch.empty(0, model.config.hidden_size) if pixels is None else model.extract_feature(pixels)
    embeds = by_hand(model, ids, features)
    mask = torch.ones_like(ids)
    return model.language_model.generate(inputs_embeds=embeds, attention_mask=mask, **options).tolist()


def _same_up_to_padding(own: list[int], reference: list[int], pad: int = 2) -> bool:
    length = max(len(own), len(reference))
    return own + [pad] * (length - len(own)) == reference + [pad] * (length - len(reference))


# ------------------------------------------------------------------------------------------------- beams and sequences


@EACH
@pytest.mark.parametrize(
    "changes",
    [{}, {"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 2, "use_cache": False}],
    ids=["greedy", "beams", "returned", "no-cache"],
)
def test_each_prompt_equals_the_bare_language_model(name: str, changes: dict[str, Any]) -> None:
    model, options = load(name), _options(name, **changes)
    for ids, pixels in _rows():
        output = model.generate(input_ids=ids, pixel_values=pixels, **options).tolist()
        assert all(sequence[: ids.shape[1]] == ids[0].tolist() for sequence in output)
        assert [sequence[ids.shape[1] :] for sequence in output] == _bare(model, ids, pixels, **options)


@EACH
@pytest.mark.parametrize("changes", [{}, {"num_beams": 2, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_left_padded_batch_equals_its_rows(name: str, changes: dict[str, Any]) -> None:
    """Images of two, one and no tiles side by side; every row must find its own."""
    model, options = load(name), _options(name, **changes)
    batch = _left_padded()
    output = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :].tolist()
    tiles, count = batch["pixel_values"].split([2, 1]), len(output) // 3
    for row, prompt in enumerate(PROMPTS):
        pixels = tiles[row] if row < 2 else None
        reference = _bare(model, torch.tensor([prompt]), pixels, **options)
        for own, alone in zip(output[row * count : (row + 1) * count], reference, strict=True):
            assert _same_up_to_padding(own, alone), row


@pytest.mark.parametrize("name", [QWEN2, LLAMA])
def test_sampled_sequences_equal_the_bare_language_model(name: str) -> None:
    model, options = load(name), _options(name, do_sample=True, num_return_sequences=3)
    ids, pixels = _rows()[0]
    torch.manual_seed(5)
    output = model.generate(input_ids=ids, pixel_values=pixels, **options)[:, ids.shape[1] :].tolist()
    torch.manual_seed(5)
    assert output == _bare(model, ids, pixels, **options)
    assert len({tuple(sequence) for sequence in output}) > 1


# --------------------------------------------------------------------------------------------------- caches and inputs


@EACH
def test_static_cache_equals_dynamic(name: str) -> None:
    model = load(name)
    for ids, pixels in _rows():
        dynamic = model.generate(input_ids=ids, pixel_values=pixels, **_options(name))
        static = model.generate(input_ids=ids, pixel_values=pixels, **_options(name, cache_implementation="static"))
        assert torch.equal(static, dynamic)


@pytest.mark.parametrize("name", [QWEN2, INTERNLM2])
@pytest.mark.parametrize("changes", [{}, {"use_cache": False}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_generated_context_tokens_are_text(name: str, changes: dict[str, Any]) -> None:
    """A model may write `<IMG_CONTEXT>` itself; no image belongs there."""
    model = load(name)
    for ids, pixels in _rows():
        own = _options(name, logits_processor=[Forced(ids.shape[1], [CONTEXT, CONTEXT, 50, CONTEXT])], **changes)
        bare = {**own, "logits_processor": [Forced(0, [CONTEXT, CONTEXT, 50, CONTEXT])]}
        output = model.generate(input_ids=ids, pixel_values=pixels, **own)[:, ids.shape[1] :].tolist()
        assert output[0][:4] == [CONTEXT, CONTEXT, 50, CONTEXT]
        assert output == _bare(model, ids, pixels, **bare)


@torch.no_grad()
def test_step_by_step_through_forward(qwen2: InternVLChatModel) -> None:
    """A decoding loop by hand: the image with the prompt, then one token at a time, context tokens among them."""
    ids, pixels = _rows()[0]
    tail = torch.tensor([[50, CONTEXT, 51, CONTEXT]])
    embeds = by_hand(qwen2, ids, qwen2.extract_feature(pixels))
    embeds = torch.cat([embeds, qwen2.get_input_embeddings()(tail)], dim=1)
    reference = qwen2.language_model(inputs_embeds=embeds).logits[:, -4:]
    cache = qwen2(input_ids=ids, pixel_values=pixels, use_cache=True).past_key_values
    steps = [qwen2(input_ids=tail[:, i : i + 1], past_key_values=cache).logits for i in range(4)]
    torch.testing.assert_close(torch.cat(steps, dim=1), reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flat", [True, False])
def test_ready_features_generate_the_same(qwen2: InternVLChatModel, flat: bool) -> None:
    ids, pixels = _rows()[0]
    features = qwen2.extract_feature(pixels).detach()
    features = features.flatten(0, 1) if flat else features
    reference = qwen2.generate(input_ids=ids, pixel_values=pixels, **_options(QWEN2))
    assert torch.equal(qwen2.generate(input_ids=ids, visual_features=features, **_options(QWEN2)), reference)


def test_image_flags_generate_the_same(qwen2: InternVLChatModel) -> None:
    ids, pixels = _rows()[1]
    reference = qwen2.generate(input_ids=ids, pixel_values=pixels, **_options(QWEN2))
    padded = {"pixel_values": torch.cat([torch.randn_like(pixels), pixels]), "image_flags": torch.tensor([[0], [1]])}
    assert torch.equal(qwen2.generate(input_ids=ids, **padded, **_options(QWEN2)), reference)


def test_prompt_may_be_positional_or_embedded(qwen2: InternVLChatModel) -> None:
    ids, pixels = _rows()[0]
    reference = qwen2.generate(input_ids=ids, pixel_values=pixels, **_options(QWEN2))
    assert torch.equal(qwen2.generate(ids, pixel_values=pixels, **_options(QWEN2)), reference)
    embeds = qwen2.embed_prompt(ids, pixels)
    new = qwen2.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), **_options(QWEN2))
    assert torch.equal(new, reference[:, ids.shape[1] :])


def test_pixels_as_first_argument_are_an_error(qwen2: InternVLChatModel) -> None:
    with pytest.raises(TypeError, match="pass images as pixel_values"):
        qwen2.generate(torch.randn(1, 3, 56, 56))


def test_images_are_encoded_once(qwen2: InternVLChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    qwen2.vision_model.register_forward_pre_hook(
        lambda _, args, kwargs: batches.append(kwargs["pixel_values"].shape[0]), with_kwargs=True
    )
    ids, pixels = _rows()[0]
    qwen2.generate(input_ids=ids, pixel_values=pixels, **_options(QWEN2, num_beams=3, num_return_sequences=3))
    assert batches == [2]


def test_end_of_turn_stops(qwen2: InternVLChatModel) -> None:
    ids, pixels = _rows()[0]
    forced = [Forced(ids.shape[1], [50, END_OF_TURN[QWEN2]])]
    output = qwen2.generate(input_ids=ids, pixel_values=pixels, **_options(QWEN2, logits_processor=forced))
    assert output[0, ids.shape[1] :].tolist() == [50, END_OF_TURN[QWEN2]]


def test_scores_and_dictionary_output(qwen2: InternVLChatModel) -> None:
    ids, pixels = _rows()[0]
    plain = _options(QWEN2, return_dict_in_generate=True, output_logits=True)
    output = qwen2.generate(input_ids=ids, pixel_values=pixels, **plain)
    full = qwen2(input_ids=ids, pixel_values=pixels).logits[:, -1]
    torch.testing.assert_close(output.logits[0], full, rtol=1e-4, atol=1e-5)
    assert len(output.logits) == output.sequences.shape[1] - ids.shape[1]


def test_second_load_can_still_generate() -> None:
    """transformers adds GenerationMixin to remote classes only once; the class has it by itself."""
    assert all(load(QWEN2).can_generate() for _ in range(2))
    assert load(QWEN2).generation_config is not None
