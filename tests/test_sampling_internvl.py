"""Sampled sequences share the computation of their prompt: what comes out is what transformers alone gives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import CHAT, CHECKPOINTS, CONTEXT, LLAMA, PHI3, QWEN2, VOCABULARY, chat_config, load
from transformers import PreTrainedTokenizerFast

from internvl_hub import decoding_internvl
from internvl_hub.modeling_internvl_chat import InternVLChatModel
from internvl_hub.sampling_internvl import shares_prompt

PROMPTS = ([3, 9, *[CONTEXT] * 8, 10, 40, 41, 4], [3, 9, *[CONTEXT] * 4, 10, 60, 4], [3, 70, 71, 4])
SAMPLING = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 6, "pad_token_id": 2, "eos_token_id": 4}


def _batch(pixels: bool = True) -> dict[str, torch.Tensor]:
    """Prompts about two tiles, one and none, padded on the left."""
    length = max(map(len, PROMPTS))
    ids = torch.tensor([[2] * (length - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in PROMPTS])
    inputs = {"input_ids": ids, "attention_mask": mask}
    return {**inputs, "pixel_values": torch.randn(3, 3, 56, 56)} if pixels else {**inputs, "input_ids": mask * 40 + 2}


def _generate(model: InternVLChatModel, seed: int = 5, **inputs: Any) -> Any:
    torch.manual_seed(seed)
    return model.generate(**inputs)


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The same generation without sharing: transformers repeats the prompt."""

    def run(model: InternVLChatModel, **inputs: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(decoding_internvl, "shares_prompt", lambda *_: False)
            return _generate(model, **inputs)

    return run


def _tiny(kind: str) -> InternVLChatModel:
    return InternVLChatModel(chat_config(kind)).eval()


def _prompt_rows(model: InternVLChatModel) -> list[tuple[int, int]]:
    """Shapes (rows, tokens) of everything that goes through the decoder."""
    shapes: list[tuple[int, int]] = []
    model.language_model.get_decoder().register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(
            tuple((kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]).shape[:2])
        ),
        with_kwargs=True,
    )
    return shapes


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("pixels", [True, False], ids=["images", "text"])
def test_checkpoints_sample_the_same(name: str, pixels: bool, reference: Callable) -> None:
    model, inputs = load(name), {**_batch(pixels), **SAMPLING}
    expected = reference(model, **inputs)
    shapes = _prompt_rows(model)
    output = _generate(model, **inputs)
    assert torch.equal(output, expected)
    assert output.shape[0] == 9 and len({tuple(row) for row in output.tolist()}) > 3
    assert shapes[0] == (3, 13) and shapes[1] == (9, 1)  # each prompt once, then its last token for every sequence


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "gpt_oss", "gemma2"])
def test_other_language_models_sample_the_same(kind: str, reference: Callable) -> None:
    """Experts, sliding windows and attention sinks among them."""
    model, inputs = _tiny(kind), {**_batch(), **SAMPLING, "eos_token_id": None}
    expected = reference(model, **inputs)
    shapes = _prompt_rows(model)
    assert torch.equal(_generate(model, **inputs), expected)
    assert shapes[0] == (3, 13)


def test_scores_are_those_of_repeated_prompts(reference: Callable) -> None:
    model, inputs = load(QWEN2), {**_batch(), **SAMPLING, "return_dict_in_generate": True, "output_scores": True}
    expected, output = reference(model, **inputs), _generate(model, **inputs)
    torch.testing.assert_close(torch.stack(output.scores), torch.stack(expected.scores), rtol=1e-5, atol=1e-5)


def test_embeddings_alone_return_new_tokens_alone(reference: Callable) -> None:
    model, inputs = load(QWEN2), _batch()
    embeds = model.embed_prompt(inputs["input_ids"], inputs["pixel_values"]).detach()
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], **SAMPLING}
    expected = reference(model, **given)
    shapes = _prompt_rows(model)
    output = _generate(model, **given)
    assert torch.equal(output, expected) and output.shape[1] <= 6 and shapes[0] == (3, 13)


def test_prompt_penalties_see_the_prompt(reference: Callable) -> None:
    """A repetition penalty on ids counts those of the prompt, shared or not."""
    model, inputs = load(LLAMA), {**_batch(pixels=False), **SAMPLING, "repetition_penalty": 5.0}
    assert torch.equal(_generate(model, **inputs), reference(model, **inputs))


def test_settings_of_the_checkpoint_count(reference: Callable) -> None:
    model, inputs = load(QWEN2), _batch()
    model.generation_config.do_sample, model.generation_config.num_return_sequences = True, 2
    expected = reference(model, **inputs, max_new_tokens=4, pad_token_id=2)
    shapes = _prompt_rows(model)
    assert torch.equal(_generate(model, **inputs, max_new_tokens=4, pad_token_id=2), expected)
    assert shapes[0] == (3, 13)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_return_sequences": 1},
        {"num_beams": 3},
        {"do_sample": False, "num_return_sequences": 1},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"attention_mask": None},
    ],
    ids=["one", "beams", "greedy", "no-cache", "static", "hidden", "no-mask"],
)
def test_everything_else_is_left_to_transformers(changes: dict[str, Any]) -> None:
    model, inputs = load(QWEN2), {**_batch(), **SAMPLING, **changes}
    assert not shares_prompt(model, inputs)
    shapes = _prompt_rows(model)
    _generate(model, **inputs)
    assert shapes[0][1] == 14


def test_recurrent_language_models_are_left_to_transformers() -> None:
    assert not shares_prompt(_tiny("recurrent_gemma"), {**_batch(), **SAMPLING})


@pytest.mark.parametrize(("length", "shared"), [(1024, True), (1025, False)])
def test_positions_that_change_with_length(length: int, shared: bool, reference: Callable) -> None:
    """LongRoPE takes other frequencies beyond 1024 tokens here."""
    model, ids = load(PHI3), torch.randint(20, 400, (1, length))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **SAMPLING}
    assert shares_prompt(model, inputs) == shared
    assert torch.equal(_generate(model, **inputs), reference(model, **inputs))


# ------------------------------------------------------------------------------------------------------ batch_answers


def _chat(name: str = QWEN2) -> tuple[InternVLChatModel, PreTrainedTokenizerFast]:
    return load(name), PreTrainedTokenizerFast.from_pretrained(CHAT / name)


QUESTIONS = ["<image>\nWhat?", "And <image> this?", "Hello"]
CONFIG = {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": 5}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_greedy_answers_are_those_of_batch_chat(name: str) -> None:
    model, tokenizer = _chat(name)
    pixels, greedy = torch.randn(3, 3, 56, 56), {"do_sample": False, "max_new_tokens": 6}
    arguments = (tokenizer, pixels, QUESTIONS, greedy, [[2], [1], []])
    answers = model.batch_answers(*arguments)
    assert [[answer.text.strip() for answer in row] for row in answers] == [[t] for t in model.batch_chat(*arguments)]


def test_every_question_gets_its_answers() -> None:
    model, tokenizer = _chat()
    torch.manual_seed(1)
    answers = model.batch_answers(tokenizer, torch.randn(3, 3, 56, 56), QUESTIONS, CONFIG, [[2], [1], []])
    assert [len(row) for row in answers] == [4, 4, 4]
    assert len({answer.text for answer in answers[0]}) > 1
    for answer in (answer for row in answers for answer in row):
        assert len(answer.ids) <= 5
        assert answer.complete == (answer.ids[-1] in (4, 2))
        assert answer.complete or len(answer.ids) == 5


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("prefix", ["ab", "ab cd", "a ", " a", "é中"])
def test_prefix_and_text_join_to_what_the_ids_say(name: str, prefix: str) -> None:
    """The continuation starts right where the prefix ends: no space is lost or doubled."""
    model, tokenizer = _chat(name)
    alone, together = model.batch_answers(
        tokenizer, None, ["Hi", "Hi"], {"do_sample": False, "max_new_tokens": 4}, answer_prefixes=["", prefix]
    )
    (answer,) = together
    prompt = tokenizer(f"x{prefix}", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    whole = tokenizer.decode([*prompt, *answer.ids], skip_special_tokens=True)
    assert (f"x{prefix}" + answer.text).strip() == whole.strip()
    assert alone[0].text.strip() == model.chat(tokenizer, None, "Hi", {"do_sample": False, "max_new_tokens": 4})


def test_a_prefix_is_the_beginning_of_the_answer() -> None:
    """Continuing half of a greedy answer gives its other half."""
    model, tokenizer = _chat()
    words = {i for token, i in tokenizer.get_vocab().items() if token[0] == "Ġ" and token[1:].isalpha()}
    others = [i for i in range(VOCABULARY) if i not in words]  # half characters, and markup, which is no text
    greedy, compared = {"do_sample": False, "max_new_tokens": 8, "suppress_tokens": others}, 0
    for question in map(str, range(20)):
        ((whole,),) = model.batch_answers(tokenizer, None, [question], greedy)
        half = tokenizer.decode(whole.ids[:4])
        if tokenizer(half, add_special_tokens=False, split_special_tokens=True)["input_ids"] != list(whole.ids[:4]):
            continue  # a word that the tokenizer cuts otherwise
        options = {**greedy, "max_new_tokens": 4}
        ((rest,),) = model.batch_answers(tokenizer, None, [question], options, answer_prefixes=[half])
        assert rest.ids == whole.ids[4:] and half + rest.text == whole.text
        compared += 1
    assert compared > 3


def test_system_text_for_one_call() -> None:
    model, tokenizer = _chat()
    greedy = {"do_sample": False, "max_new_tokens": 6}
    other = load(QWEN2)
    other.system_message = "Be brief."
    expected = other.chat(tokenizer, None, "Hi", greedy)
    assert expected != model.chat(tokenizer, None, "Hi", greedy)
    assert model.chat(tokenizer, None, "Hi", greedy, system="Be brief.") == expected
    assert model.batch_chat(tokenizer, None, ["Hi"], greedy, system="Be brief.") == [expected]
    assert "".join(model.stream_chat(tokenizer, None, "Hi", greedy, system="Be brief.")) == expected
    assert model.batch_answers(tokenizer, None, ["Hi"], greedy, system="Be brief.")[0][0].text.strip() == expected
    assert model.system_message != "Be brief."


def test_prefixes_must_fit_the_questions() -> None:
    model, tokenizer = _chat()
    with pytest.raises(ValueError, match="answer_prefixes has 2 entries for 1 questions"):
        model.batch_answers(tokenizer, None, ["Hi"], answer_prefixes=["a", "b"])
