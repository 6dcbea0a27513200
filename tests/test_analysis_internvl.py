"""Scores, log-probabilities, attention in pixels and pooled features, each against a computation of another kind."""

import copy
import math
import threading
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CHAT, INTERNLM2, LLAMA, QWEN2, load
from transformers import GenerationConfig, PreTrainedTokenizerFast
from versions import CHECKPOINTING

from internvl_hub.attention_internvl import Tiling, attention_map_of, attention_rows
from internvl_hub.image_processing_internvl import InternVLImageProcessor
from internvl_hub.modeling_internvl_chat import pixel_shuffle
from internvl_hub.prompting_internvl import prompt_encoder

CHOICES = ["A cat", "a", "", "no <box> at all", "A cat."]


@cache
def loaded(name: str):
    return load(name), PreTrainedTokenizerFast.from_pretrained(CHAT / name)


def tiles(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 56, 56, generator=torch.Generator().manual_seed(count))


def plain_log_probs(model, ids: list[int], pixel_values: torch.Tensor | None, count: int) -> list[float]:
    """Of the last `count` ids, from an ordinary forward pass."""
    logits = model(input_ids=torch.tensor([ids]), pixel_values=pixel_values).logits[0].double()
    rows = logits.log_softmax(-1)[-count - 1 : -1]
    return [rows[i, index].item() for i, index in enumerate(ids[-count:])]


# ------------------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("name", [QWEN2, INTERNLM2, LLAMA])
@torch.no_grad()
def test_scores_are_those_of_training_rows(name: str) -> None:
    model, tokenizer = loaded(name)
    history = [("<image>\nWhat?", "A cat.")]
    scores = model.score(tokenizer, tiles(2), "And <image>?", CHOICES, [1, 1], history, batch_size=2)
    encoder = prompt_encoder(tokenizer)
    for choice, values, total in zip(CHOICES, scores.token_log_probs, scores.log_probs, strict=True):
        conversation = model.conv_template
        for i, text in enumerate([*history[0], "And <image>?", choice]):
            conversation.append_message(conversation.roles[i % 2], text)
        row = encoder.encode_supervised(conversation.segments(), [4, 4])
        end = max(i for i, on in enumerate(row.supervised) if on) + 1
        ids = row.input_ids[:end]  # up to the end of turn, which counts
        assert ids[-1] == encoder.token_id(conversation.template.end_of_turn)
        assert values == pytest.approx(plain_log_probs(model, ids, tiles(2), len(values)), abs=1e-4)
        assert total == pytest.approx(sum(values))
        assert len(values) == len(ids) - len(encoder.encode(
            [*conversation.segments()[: _last_answer(conversation)]], [4, 4]).input_ids)  # fmt: skip
    assert sum(scores.probabilities) == pytest.approx(1)
    shares = np.exp(scores.log_probs) / np.exp(scores.log_probs).sum()
    assert scores.probabilities == pytest.approx(shares.tolist())
    assert scores.best == CHOICES[int(np.argmax(scores.log_probs))]


def _last_answer(conversation) -> int:
    """Number of segments before the last answer."""
    segments = conversation.segments()
    supervised = [i for i, segment in enumerate(segments) if segment.supervised]
    first = supervised[-1]
    while first - 1 in supervised:
        first -= 1
    return first


def test_images_are_encoded_once_and_the_batch_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded(QWEN2)
    seen, encode = [], type(model)._encode_tiles
    monkeypatch.setattr(type(model), "_encode_tiles", lambda self, p: seen.append(len(p)) or encode(self, p))
    whole = model.score(tokenizer, tiles(3), "What?", CHOICES)
    single = model.score(tokenizer, tiles(3), "What?", CHOICES, batch_size=1, normalize="mean")
    assert seen == [3, 3]
    lengths = [len(row) for row in whole.token_log_probs]
    assert [a / n for a, n in zip(whole.log_probs, lengths, strict=True)] == pytest.approx(single.log_probs, abs=1e-5)
    assert len(set(lengths)) > 2 and math.isclose(sum(single.probabilities), 1)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"choices": []}, "choices"), ({"choices": "ab"}, "choices"), ({"choices": [1]}, "choices"),
     ({"normalize": "max"}, "normalize"), ({"batch_size": 0}, "batch_size")],
    ids=range(5),
)  # fmt: skip
def test_bad_arguments_of_score(wrong: dict, words: str) -> None:
    model, tokenizer = loaded(QWEN2)
    with pytest.raises(ValueError, match=words):
        model.score(tokenizer, None, "Q", **{"choices": ["a"], **wrong})


def test_choices_may_be_any_iterable() -> None:
    model, tokenizer = loaded(QWEN2)
    assert model.score(tokenizer, None, "Q", iter(["a", "b"])) == model.score(tokenizer, None, "Q", ["a", "b"])


@pytest.mark.parametrize("as_object", [False, True])
@torch.no_grad()
def test_log_probs_of_answers_equal_a_plain_forward(as_object: bool) -> None:
    model, tokenizer = loaded(QWEN2)
    options = {"max_new_tokens": 5, "do_sample": True, "temperature": 0.5, "top_k": 7, "num_return_sequences": 2}
    config = GenerationConfig(**options) if as_object else options
    questions, patches = ["<image>\nWhat is it?", "Hi"], [[2], []]
    rows = model.batch_answers(tokenizer, tiles(2), questions, config, patches, return_log_probs=True)
    for question, answers, pixels in zip(questions, rows, (tiles(2), None), strict=True):
        conversation = model.conv_template
        conversation.append_message(conversation.roles[0], question)
        conversation.append_message(conversation.roles[1], None)
        prompt = prompt_encoder(tokenizer).encode(conversation.segments(), [8] if pixels is not None else []).input_ids
        for answer in answers:
            assert len(answer.log_probs) == len(answer.ids)
            wanted = plain_log_probs(model, [*prompt, *answer.ids], pixels, len(answer.ids))
            assert answer.log_probs == pytest.approx(wanted, abs=1e-4)
    if as_object:
        assert not config.output_logits and not config.return_dict_in_generate
    assert model.batch_answers(tokenizer, None, ["Hi"], {"max_new_tokens": 1})[0][0].log_probs is None
    with pytest.raises(ValueError, match="beams"):
        model.batch_answers(tokenizer, None, ["Hi"], {"num_beams": 2}, return_log_probs=True)


# ----------------------------------------------------------------------------------------------------------- attention

SIZES = [(56, 56), (300, 100), (100, 300), (333, 222), (40, 37), (640, 480)]


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_hot_spot_comes_back_to_its_pixels(size: tuple[int, int], version: str) -> None:
    """White on black, through image processor and pixel shuffle; what comes out bright must be where it was."""
    width, height = size
    left, top = round(width * 0.62), round(height * 0.2)
    right, bottom = left + max(4, width // 5), top + max(4, height // 6)
    picture = np.zeros((height, width, 3), np.uint8)
    picture[top:bottom, left:right] = 255
    processor = InternVLImageProcessor(image_size=56, max_dynamic_patch=6, image_mean=0.0, image_std=1.0)
    pixels = processor([Image.fromarray(picture)])["pixel_values"][:, 0].clamp(min=0)
    tiling = Tiling.of(processor, size)
    assert len(pixels) == tiling.tiles
    patches = torch.nn.functional.avg_pool2d(pixels[:, None], 14).permute(0, 2, 3, 1)  # 4 x 4 patches of brightness
    tokens = pixel_shuffle(patches, 0.5, version).mean(-1).flatten()[None]
    found = attention_map_of(tokens / tokens.sum(), ["x"], tiling, version == "v1")
    assert found.pixels.shape == (height, width) and found.pixels.sum() == pytest.approx(1)
    rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    centre = (found.pixels.sum(0) @ columns.double()).item(), (found.pixels.sum(1) @ rows.double()).item()
    # Tokens are 2 x 2 to a tile: the centre of mass may be off by half a token of the coarsest view, the thumbnail.
    assert abs(centre[0] - (left + right) / 2) <= width / 4 and abs(centre[1] - (top + bottom) / 2) <= height / 4
    finest = tiling.to_pixels(found.by_token[0], thumbnail=False)
    y, x = divmod(int(finest.argmax()), width)
    cell = width / (2 * tiling.grid[0]), height / (2 * tiling.grid[1])
    assert left - cell[0] <= x <= right + cell[0] and top - cell[1] <= y <= bottom + cell[1]


@pytest.mark.parametrize("grid", [(1, 1), (3, 1), (2, 3)], ids=str)
def test_each_token_covers_its_own_rectangle(grid: tuple[int, int]) -> None:
    columns, rows = grid
    tiling = Tiling((columns * 20, rows * 30), grid, columns * rows > 1)
    side = 2
    for tile in range(columns * rows):
        for row in range(side):
            for column in range(side):
                weights = torch.zeros(1, tiling.tiles * side * side)
                weights[0, tile * side * side + row * side + column] = 0.25
                lit = attention_map_of(weights, [""], tiling).pixels.nonzero()
                left, top = (tile % columns) * 20 + column * 10, (tile // columns) * 30 + row * 15
                assert lit.min(0).values.tolist() == [top, left]
                assert lit.max(0).values.tolist() == [top + 14, left + 9] and len(lit) == 150
    if tiling.has_thumbnail:
        weights = torch.zeros(1, tiling.tiles * 4)
        weights[0, -1] = 1.0
        found = attention_map_of(weights, [""], tiling)
        assert found.pixels.nonzero().min(0).values.tolist() == [rows * 15, columns * 10]
        assert found.tiles.sum() == 0 and found.thumbnail[1, 1] == 1 and found.token_pixels(0, False).sum() == 0


def test_padding_is_cut_off() -> None:
    processor = InternVLImageProcessor(image_size=56, pad2square=True, dynamic_image_size=False)
    tiling = Tiling.of(processor, (40, 20))
    assert tiling.padded and tiling.tiles == 1
    weights = torch.ones(1, 16)  # a square of 40: the picture is the middle half of it
    pixels = attention_map_of(weights / 16, [""], tiling).pixels
    assert pixels.shape == (20, 40) and pixels.sum() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="tiling"):
        attention_map_of(torch.ones(1, 12), [""], tiling)


@pytest.mark.parametrize("layers", [None, [0], [-1, 0]], ids=str)
@pytest.mark.parametrize("name", [QWEN2, LLAMA])
@torch.no_grad()
def test_rows_equal_eager_attention_of_the_whole_prompt(name: str, layers: list[int] | None) -> None:
    model = load(name, attn_implementation="sdpa")
    embeds = torch.randn(1, 12, model.config.get_text_config().hidden_size)
    found = attention_rows(model.language_model, embeds, 7, 10, slice(2, 6), layers)
    assert model.language_model.config._attn_implementation == "sdpa"
    model.language_model.set_attn_implementation("eager")
    full = model.language_model(inputs_embeds=embeds, output_attentions=True).attentions
    chosen = torch.stack([full[i] for i in (range(len(full)) if layers is None else layers)])
    torch.testing.assert_close(found, chosen[:, 0, :, 7:11, 2:6].mean((0, 1)), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="layers"):
        attention_rows(model.language_model, embeds, 7, 10, slice(2, 6), [9])


def test_attention_map_of_a_question() -> None:
    model, tokenizer = loaded(QWEN2)
    model.language_model.set_attn_implementation("sdpa")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 180, 3), np.uint8))
    found = model.attention_map(tokenizer, image, "What?", "a cat")
    ids = tokenizer("a cat", add_special_tokens=False)["input_ids"]
    assert found.tokens == [tokenizer.decode([i]) for i in ids] and len(found.by_token) == len(ids)
    assert found.pixels.shape == (60, 180) and 0 < found.pixels.sum() < 1
    assert found.pixels.sum() == pytest.approx(found.by_token.sum().item() / len(ids), abs=1e-6)
    assert found.token_pixels(0).sum() == pytest.approx(found.by_token[0].sum().item(), abs=1e-6)
    assert found.overlay(image).size == image.size
    first = model.attention_map(tokenizer, image, "What?")
    torch.testing.assert_close(first.by_token[0], found.by_token[0], atol=1e-5, rtol=1e-4)
    processor = InternVLImageProcessor(image_size=56, max_dynamic_patch=2, use_thumbnail=False)
    pixels, tiling = processor([image])["pixel_values"], Tiling.of(processor, image.size)
    assert model.attention_map(tokenizer, None, "What?", pixel_values=pixels, tiling=tiling).thumbnail is None
    for wrong in ({"image": image, "pixel_values": pixels, "tiling": tiling}, {"image": None}):
        with pytest.raises(ValueError, match="either image"):
            model.attention_map(tokenizer, question="What?", **wrong)
    with pytest.raises(ValueError, match="empty"):
        model.attention_map(tokenizer, image, "What?", "")
    with pytest.raises(ValueError, match=r"4 tiles, the tiling 1"):  # four tiles make one larger square
        model.attention_map(
            tokenizer, None, "What?", pixel_values=pixels[:1].repeat(4, 1, 1, 1), tiling=Tiling((60, 60))
        )
    assert model.language_model.config._attn_implementation == "sdpa"


def test_attention_maps_while_another_thread_chats() -> None:
    """And in training mode with activation checkpointing, where caches stay empty."""
    model, tokenizer = copy.deepcopy(loaded(QWEN2)[0]), loaded(QWEN2)[1]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 180, 3), np.uint8))
    expected = model.attention_map(tokenizer, image, "What?", "a cat").by_token
    getattr(model, f"{CHECKPOINTING}_enable")()
    model.train()
    torch.testing.assert_close(model.attention_map(tokenizer, image, "What?", "a cat").by_token, expected)
    model.eval()
    stop, decoder = threading.Event(), model.language_model.get_decoder()

    def chat_on(decoder: Any = decoder) -> None:
        while not stop.is_set():
            decoder(input_ids=torch.tensor([[5, 6, 7]]))

    others = threading.Thread(target=chat_on)
    others.start()
    try:
        for _ in range(5):
            found = model.attention_map(tokenizer, image, "What?", "a cat").by_token
            torch.testing.assert_close(found, expected)
    finally:
        stop.set()
        others.join()


# ---------------------------------------------------------------------------------------------------------- embeddings


@torch.no_grad()
def test_embeddings_are_pooled_per_image() -> None:
    model, _ = loaded(QWEN2)
    pixels, patches = tiles(5), [2, 3]
    states = model.vision_model(pixel_values=pixels).last_hidden_state
    tokens = {"vision": states[:, 1:], "projector": model.extract_feature(pixels)}
    for source, values in tokens.items():
        plain = torch.stack([part.reshape(-1, part.shape[-1]).mean(0) for part in (values[:2], values[2:])])
        found = model.image_embeddings(pixels, patches, source=source, normalize=False)
        torch.testing.assert_close(found, plain)
        unit = model.image_embeddings(pixels, patches, source=source)
        torch.testing.assert_close(unit, plain / plain.norm(dim=-1, keepdim=True))
    found = model.image_embeddings(pixels, patches, "max", normalize=False)
    torch.testing.assert_close(found[1], states[2:, 1:].flatten(0, 1).max(0).values)
    found = model.image_embeddings(pixels, patches, "cls", normalize=False, thumbnail_only=True)
    torch.testing.assert_close(found, states[[1, 4], 0])
    assert len(model.image_embeddings(pixels)) == 5
    for wrong in ({"pooling": "cls", "source": "projector"}, {"pooling": "sum"}, {"num_patches_list": [2]}):
        with pytest.raises(ValueError, match="pooling|num_patches_list"):
            model.image_embeddings(pixels, **wrong)
