"""A session reuses what it can and never changes an answer: every turn is compared with computing it afresh."""

import copy
import json
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LogitsProcessor, PreTrainedTokenizerFast

from internvl_hub.configuration_internvl_chat import InternVLChatConfig
from internvl_hub.modeling_internvl_chat import InternVLChatModel
from internvl_hub.prompting_internvl import EncodedPrompt, MediaSpan
from internvl_hub.session_internvl import ChatSession, image_digest

CHAT = Path(__file__).parent / "fixtures" / "chat"
NAMES = ["qwen2-internvl2_5", "internlm2-internlm2_chat", "llama-hermes2-vit6b", "phi3-phi3_chat"]
QWEN, INTERNLM2, _, PHI3 = NAMES
GREEDY = {"max_new_tokens": 5, "do_sample": False}


@cache
def load(name: str, limit: int | None = None) -> InternVLChatModel:
    """A fixture checkpoint; `limit` moves the length where its position encoding changes."""
    config = InternVLChatConfig.from_pretrained(CHAT / name)
    config.system_message = "Be brief."
    if limit is not None:
        llm = config.llm_config
        if llm.rope_parameters["rope_type"] == "longrope":
            llm.original_max_position_embeddings = limit
            llm.rope_parameters["original_max_position_embeddings"] = limit
        else:
            if name == QWEN:  # as in InternVL3
                llm.rope_parameters |= {"rope_type": "dynamic", "factor": 2.0}
            llm.max_position_embeddings = limit
    return InternVLChatModel.from_pretrained(CHAT / name, config=config).eval()


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(CHAT / name)


def tiles(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 3, 56, 56, generator=torch.Generator().manual_seed(seed))


CAT, DOG, FOX = tiles(2, 1), tiles(1, 2), tiles(2, 3)


class Talk:
    """A conversation of a caller: history and images, with a session or without."""

    def __init__(self, model: InternVLChatModel, tokenizer: Any, session: ChatSession | None = None) -> None:
        self.model, self.tokenizer, self.session = model, tokenizer, session
        self.history: list[tuple[str, str]] = []
        self.images: list[torch.Tensor] = []

    def ask(self, question: str, images: Sequence[torch.Tensor] = (), **options: Any) -> str:
        self.images += images
        answer, self.history = self.model.chat(
            self.tokenizer,
            torch.cat(self.images) if self.images else None,
            question,
            {**GREEDY, **options},
            history=self.history,
            return_history=True,
            num_patches_list=[len(image) for image in self.images],
            session=self.session,
        )
        return answer


@pytest.fixture
def new_ids(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What every call of `generate` wrote."""
    seen, original = [], InternVLChatModel.generate

    def generate(self, **kwargs: Any) -> torch.Tensor:
        output = original(self, **kwargs)
        seen.append(output[0].tolist())
        return output

    monkeypatch.setattr(InternVLChatModel, "generate", generate)
    return seen


def afresh(talk: Talk, question: str, images: Sequence[torch.Tensor] = (), **options: Any) -> str:
    """The same turn without a session, on a model that has seen nothing before."""
    other = Talk(copy.deepcopy(talk.model), talk.tokenizer)
    other.history, other.images = list(talk.history), list(talk.images)
    return other.ask(question, images, **options)


def both(talk: Talk, question: str, images: Sequence[torch.Tensor], new_ids: list, **options: Any) -> None:
    """Asks with the session and afresh; ids and answers must agree."""
    expected = afresh(talk, question, images, **options)
    assert talk.ask(question, images, **options) == expected
    assert new_ids[-1] == new_ids[-2]


def session_talk(name: str, limit: int | None = None) -> Talk:
    model = copy.deepcopy(load(name, limit))
    return Talk(model, tokenizer_of(name), model.new_session())


TURNS = [
    ("Hello", []),
    ("<image>\nWhat is it?", [CAT]),
    ("And the colour?", []),
    ("<image> or <image>?", [DOG, FOX]),
    ("Goodbye, then", []),
]


# ------------------------------------------------------------------------------------------------------ five turns


@pytest.mark.parametrize("name", NAMES)
def test_five_turns_equal_recomputation(name: str, new_ids: list) -> None:
    talk = session_talk(name)
    for question, images in TURNS:
        both(talk, question, images, new_ids)
    assert len({tuple(ids) for ids in new_ids}) > 2


@pytest.mark.parametrize("name", NAMES)
def test_what_is_reused(name: str) -> None:
    talk, encoded, run = session_talk(name), [], []
    talk.model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    layer = talk.model.language_model.get_decoder().layers[0]
    layer.register_forward_pre_hook(lambda module, args: run.append(args[0].shape[1]))
    prompts = prompt_lengths(talk.model)
    for question, images in TURNS:
        run.clear()
        talk.ask(question, images)
        assert talk.session.encoded_images == len(images)
        assert run[0] == prompts[-1] - talk.session.reused_tokens
        assert talk.session.reused_tokens >= (prompts[-2] if len(prompts) > 1 else 0)
    assert encoded == [2, 3]


def prompt_lengths(model: InternVLChatModel) -> list[int]:
    """Will hold the length of every prompt that the model embeds."""
    lengths: list[int] = []

    def hook(module: torch.nn.Module, args: tuple) -> None:
        if args[0].shape[1] > 1:
            lengths.append(args[0].shape[1])

    model.get_input_embeddings().register_forward_pre_hook(hook)
    return lengths


def test_a_repeated_question_runs_one_token() -> None:
    talk = session_talk(QWEN)
    first = talk.ask("<image>\nWhat?", [CAT])
    talk.history.clear()
    assert talk.ask("<image>\nWhat?") == first
    assert talk.session.encoded_images == 0
    assert talk.session.reused_tokens > 20


def test_reset_forgets() -> None:
    talk = session_talk(QWEN)
    first = talk.ask("<image>\nWhat?", [CAT])
    talk.session.reset()
    talk.history.clear()
    assert talk.ask("<image>\nWhat?") == first
    assert (talk.session.encoded_images, talk.session.reused_tokens) == (1, 0)


def test_only_features_of_present_images_are_kept() -> None:
    talk = session_talk(QWEN)
    talk.ask("<image>\n<image>\nWhat?", [CAT, DOG])
    assert set(talk.session._features) == {image_digest(CAT), image_digest(DOG)}
    talk.history, talk.images = [], []
    talk.ask("<image>\nWho?", [DOG])
    assert talk.session.encoded_images == 0
    assert set(talk.session._features) == {image_digest(DOG)}
    talk.history, talk.images = [], []
    talk.ask("Nothing to see")
    assert talk.session._features == {}


# ----------------------------------------------------------------------------------------------------------- edits


def started(name: str) -> Talk:
    talk = session_talk(name)
    for question, images in TURNS[:4]:
        talk.ask(question, images)
    return talk


def change_answer(talk: Talk) -> None:
    talk.history[1] = (talk.history[1][0], "Something else entirely.")


def change_question(talk: Talk) -> None:
    talk.history[0] = ("Hallo", talk.history[0][1])


def remove_turn(talk: Talk) -> None:
    del talk.history[2]


def remove_turn_with_image(talk: Talk) -> None:
    del talk.history[1]
    del talk.images[0]


def swap_image(talk: Talk) -> None:
    talk.images[0] = FOX


def swap_order(talk: Talk) -> None:
    talk.images[0], talk.images[2] = talk.images[2], talk.images[0]


def change_one_pixel(talk: Talk) -> None:
    talk.images[0] = CAT.clone()
    talk.images[0][1, 2, 55, 55] += 40


def change_system(talk: Talk) -> None:
    talk.model.system_message = "Be long."


EDITS = [change_answer, change_question, remove_turn, remove_turn_with_image, swap_image, swap_order]
EDITS += [change_one_pixel, change_system]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", [INTERNLM2])
def test_edits_are_noticed(name: str, edit: Any, new_ids: list) -> None:
    talk = started(name)
    before = len(talk.session._keys)
    edit(talk)
    both(talk, "So?", [], new_ids)
    assert talk.session.reused_tokens < before - 1


@pytest.mark.parametrize("edit", [swap_image, swap_order, change_one_pixel])
def test_a_changed_image_ends_the_common_prefix(edit: Any) -> None:
    talk = started(QWEN)
    edit(talk)
    talk.ask("So?")
    turn = Talk(talk.model, talk.tokenizer)
    prefix = turn.model.conv_template
    prefix.append_message(prefix.roles[0], talk.history[0][0])
    prefix.append_message(prefix.roles[1], talk.history[0][1])
    text = prefix.get_prompt() + "<|im_start|>user\n<img>"
    assert talk.session.reused_tokens == len(talk.tokenizer(text)["input_ids"])


def test_changed_image_is_encoded_alone() -> None:
    talk = started(QWEN)
    change_one_pixel(talk)
    talk.ask("So?")
    assert talk.session.encoded_images == 1


# ------------------------------------------------------------------------------------- generated context tokens


class Script(LogitsProcessor):
    """Makes a model write given ids."""

    def __init__(self, ids: list[int], fail_at: int | None = None) -> None:
        self.ids, self.step, self.fail_at = ids, 0, fail_at

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.step == self.fail_at:
            raise RuntimeError("broken on purpose")
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self.ids[self.step]] = 0
        self.step += 1
        return forced


def test_keys_of_visual_positions_are_no_ids() -> None:
    prompt = EncodedPrompt([5, 11, 11, 6, 11, 11], [MediaSpan("image", 1, 2), MediaSpan("image", 4, 2)])
    cat, dog = image_digest(CAT), image_digest(DOG)
    keys = ChatSession.prompt_keys(prompt, [cat, dog])
    assert (keys[0], keys[3]) == (5, 6)
    visual = [keys[i] for i in (1, 2, 4, 5)]
    assert len(set(visual)) == 4 and max(visual) < 0
    assert ChatSession.prompt_keys(prompt, [cat, cat])[1:3] == keys[1:3]
    assert set(ChatSession.prompt_keys(prompt, [dog, cat])[1:3]).isdisjoint(keys[1:3])


def test_generated_context_tokens_match_no_image(new_ids: list) -> None:
    talk = session_talk(QWEN)
    context = talk.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    written = [context] * 5
    talk.ask("Hello", logits_processor=[Script(written)])
    assert new_ids[-1] == written
    prompt = talk.session._keys[: -len(written) + 1]
    assert talk.session._keys[len(prompt) :] == written[:-1]
    keys = ChatSession.prompt_keys(
        EncodedPrompt([*prompt, *written, 5], [MediaSpan("image", len(prompt), 5)]), [image_digest(CAT)]
    )
    assert talk.session._common_prefix(keys) == len(prompt)
    both(talk, "<image>\nWhat?", [CAT], new_ids)


def test_digests_tell_shape_type_and_values() -> None:
    variants = [CAT, FOX, CAT[:1], CAT.double(), CAT.bfloat16(), CAT.reshape(1, 6, 56, 56)]
    assert len({image_digest(variant) for variant in variants}) == len(variants)
    assert image_digest(CAT) == image_digest(CAT.clone()) == image_digest(CAT.transpose(0, 1).clone().transpose(0, 1))


# --------------------------------------------------------------------------------------------- changing frequencies

# A first prompt has some 20 tokens, each turn adds 15 to 30: these limits fall into prompts and into answers.
LIMITS = [16, 23, 45, 70, 100]


def crosses(name: str, limit: int, new_ids: list) -> list[tuple[int, bool]]:
    """Each turn's prompt length and whether the cache was reused."""
    talk, output = session_talk(name, limit), []
    lengths = prompt_lengths(talk.model)
    for question, images in TURNS:
        both(talk, question, images, new_ids)
        output.append((lengths[-1], talk.session.reused_tokens > 0))
    talk.history, talk.images = talk.history[:1], []
    both(talk, "Back to a short one", [], new_ids)
    return output


@pytest.mark.parametrize("limit", LIMITS)
def test_dynamic_ntk_across_its_limit(limit: int, new_ids: list) -> None:
    turns = crosses(INTERNLM2, limit, new_ids)
    assert turns[-1][0] > limit
    # Beyond the limit every length has its own frequencies.
    assert [reused for _, reused in turns] == [i > 0 and length < limit for i, (length, _) in enumerate(turns)]


@pytest.mark.parametrize("limit", LIMITS)
def test_longrope_across_its_limit(limit: int, new_ids: list) -> None:
    turns = crosses(PHI3, limit, new_ids)
    assert turns[-1][0] > limit
    # The long frequencies are one set: only the turn that crosses the limit starts anew.
    long = [length > limit for length, _ in turns]
    assert [reused for _, reused in turns] == [i > 0 and long[i] == long[i - 1] for i in range(len(turns))]


def test_the_limit_changes_something() -> None:
    """Else the tests above would compare like with like."""
    for name in (QWEN, INTERNLM2, PHI3):
        talks = [session_talk(name, limit) for limit in (45, None)]
        logits = []
        for talk in talks:
            ids = torch.arange(20, 100)[None]
            with torch.no_grad():
                logits.append(talk.model(input_ids=ids).logits)
        assert not torch.allclose(*logits, atol=1e-3)


@pytest.mark.parametrize("name", [QWEN, INTERNLM2, PHI3])
def test_a_short_prompt_after_a_long_one(name: str) -> None:
    """Other frequencies in between leave nothing behind."""
    model = session_talk(name, 45).model
    short, long = torch.arange(20, 40)[None], torch.arange(20, 100)[None]
    with torch.no_grad():
        before, _, after = (model(input_ids=ids).logits for ids in (short, long, short))
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("name", "extra"), [(name, extra) for name in (QWEN, INTERNLM2, PHI3) for extra in (-1, 0, 1)]
)
def test_a_prompt_at_the_very_limit(name: str, extra: int, new_ids: list) -> None:
    """After an answer that went beyond it."""
    probe = session_talk(name)
    probe.ask("Hello there, my friend!", max_new_tokens=1)
    talk = session_talk(name, len(probe.session._keys) - extra)
    talk.ask("Hello there, my dear", max_new_tokens=20)
    talk.history = []
    # Recomputed on the same model: the library keeps the longest length it has seen until a shorter one resets it.
    other = Talk(copy.deepcopy(talk.model), talk.tokenizer)
    expected = other.ask("Hello there, my friend!", max_new_tokens=10)
    assert talk.ask("Hello there, my friend!", max_new_tokens=10) == expected
    assert new_ids[-1] == new_ids[-2]


# -------------------------------------------------------------------------------------------- sliding windows


@cache
def sliding(architecture: str, window: int) -> InternVLChatModel:
    values = json.loads((CHAT / QWEN / "config.json").read_text(encoding="utf-8"))
    values["llm_config"] = {
        "architectures": [architecture],
        "vocab_size": 420,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.3,
        "sliding_window": window,
        "eos_token_id": 4,
        "bos_token_id": 1,
        "pad_token_id": 2,
    }
    if architecture.startswith("Qwen2"):
        values["llm_config"] |= {"use_sliding_window": True, "max_window_layers": 1}
    torch.manual_seed(3)
    model = InternVLChatModel(InternVLChatConfig(**values, system_message="Be brief.")).eval()
    return model


@pytest.mark.parametrize("window", [16, 50, 4096])
@pytest.mark.parametrize("architecture", ["MistralForCausalLM", "Qwen2ForCausalLM"])
def test_sliding_windows(architecture: str, window: int, new_ids: list) -> None:
    model = copy.deepcopy(sliding(architecture, window))
    talk, reused = Talk(model, tokenizer_of(QWEN), model.new_session()), []
    for question, images in TURNS[:4]:
        both(talk, question, images, new_ids)
        reused.append(talk.session.reused_tokens)
    change_answer(talk)
    both(talk, "So?", [], new_ids)
    assert (reused[-1] > 0) == (window == 4096)
    assert len({tuple(ids) for ids in new_ids}) > 2


def test_the_window_is_in_use() -> None:
    ids = torch.arange(20, 100)[None]
    with torch.no_grad():
        near, far = (sliding("MistralForCausalLM", window)(input_ids=ids).logits[0, -1] for window in (16, 4096))
    assert not torch.allclose(near, far, atol=1e-3)


# -------------------------------------------------------------------------------------------- accidents and options


def test_an_error_leaves_a_usable_session(new_ids: list) -> None:
    talk = session_talk(QWEN)
    talk.ask("<image>\nWhat?", [CAT])
    with pytest.raises(RuntimeError, match="on purpose"):
        talk.ask("And?", logits_processor=[Script([60] * 9, fail_at=3)])
    both(talk, "And?", [], new_ids)
    assert talk.session.encoded_images == 0
    both(talk, "Why?", [], new_ids)
    assert talk.session.reused_tokens > 0


def test_an_error_in_another_branch_leaves_nothing_behind(new_ids: list) -> None:
    """The interrupted turn has overwritten what the session remembers of the first."""
    talk = session_talk(QWEN)
    talk.ask("Hello, this is a first turn")
    history, talk.history = talk.history, []
    with pytest.raises(RuntimeError, match="on purpose"):
        talk.ask("A quite different question, and a long one at that", logits_processor=[Script([60] * 9, fail_at=3)])
    talk.history = history
    both(talk, "And?", [], new_ids)


def test_a_wrong_call_leaves_a_usable_session(new_ids: list) -> None:
    talk = session_talk(QWEN)
    talk.ask("<image>\nWhat?", [CAT])
    with pytest.raises(ValueError, match="placeholder"):
        talk.ask("<image>?")
    both(talk, "And?", [], new_ids)
    assert talk.session.reused_tokens > 0


OPTIONS = [
    {"num_beams": 2},
    {"cache_implementation": "static"},
    {"use_cache": False},
    {"num_beams": 2, "num_return_sequences": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options))
def test_options_that_a_session_cannot_serve(options: dict, new_ids: list) -> None:
    talk = session_talk(QWEN)
    talk.ask("<image>\nWhat?", [CAT])
    both(talk, "And?", [], new_ids, **options)
    both(talk, "Why?", [], new_ids)
    assert talk.session.encoded_images == 0
    both(talk, "How?", [], new_ids)
    assert talk.session.reused_tokens > 0


def test_options_in_the_models_own_generation_config(new_ids: list) -> None:
    talk = session_talk(QWEN)
    talk.model.generation_config.num_beams = 2
    for question, images in TURNS[:3]:
        both(talk, question, images, new_ids)


def stream(talk: Talk, question: str) -> Any:
    patches = [len(image) for image in talk.images]
    arguments = talk.tokenizer, torch.cat(talk.images), question, GREEDY, talk.history, patches
    return talk.model.stream_chat(*arguments, session=talk.session)


def test_streams_share_the_session(new_ids: list) -> None:
    talk = session_talk(QWEN)
    talk.ask("<image>\nWhat?", [CAT])
    expected = afresh(talk, "And?")
    assert "".join(stream(talk, "And?")) == expected
    assert talk.session.reused_tokens > 0
    assert talk.session.encoded_images == 0
    talk.history = [*talk.history, ("And?", expected)]
    both(talk, "Why?", [], new_ids)
    assert talk.session.reused_tokens > 0


def test_a_closed_stream_leaves_a_usable_session(new_ids: list) -> None:
    talk = session_talk(QWEN)
    talk.ask("<image>\nWhat?", [CAT])
    pieces = stream(talk, "And?")
    next(pieces)
    pieces.close()
    both(talk, "Why?", [], new_ids)


def test_two_conversations_do_not_meet(new_ids: list) -> None:
    model = copy.deepcopy(load(QWEN))
    first = Talk(model, tokenizer_of(QWEN), model.new_session())
    second = Talk(model, tokenizer_of(QWEN), model.new_session())
    first.ask("<image>\nWhat?", [CAT])
    both(second, "<image>\nWhat?", [FOX], new_ids)
    both(first, "And?", [], new_ids)
    assert first.session.reused_tokens > 0


def test_a_session_of_another_model_is_refused() -> None:
    model, other = load(QWEN), copy.deepcopy(load(QWEN))
    with pytest.raises(ValueError, match="belongs to another model"):
        other.chat(tokenizer_of(QWEN), None, "Hi", GREEDY, session=model.new_session())


def test_a_session_follows_the_active_adapters() -> None:
    model = copy.deepcopy(load(QWEN))
    settings = {"r": 2, "lora_alpha": 64, "target_modules": r".*(q_proj|qkv)", "init_lora_weights": False}
    torch.manual_seed(1)
    tuned = get_peft_model(model, LoraConfig(**settings), "a")
    tuned.add_adapter("b", LoraConfig(**settings))
    tokenizer, session = tokenizer_of(QWEN), model.new_session()
    turns = [("a", True), ("b", True), ("b", True), ("b", False), ("a", True)]
    history, reused, answers = None, [], []
    for name, active in turns:
        tuned.set_adapter(name)
        with nullcontext() if active else tuned.disable_adapter():
            question = "And?" if history else "<image>\nHi"
            wanted = model.chat(tokenizer, CAT, question, GREEDY, history=history)
            answer, history = model.chat(
                tokenizer, CAT, question, GREEDY, history=history, session=session, return_history=True
            )
        assert answer == wanted
        answers.append(answer)
        reused.append((session.reused_tokens > 0, session.encoded_images))
    assert reused == [(False, 1), (False, 1), (True, 0), (False, 1), (False, 1)]
