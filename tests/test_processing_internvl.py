"""The processor: ids equal those of `chat`, typed markup is text, and everything survives saving as remote code."""

import base64
import copy
import io
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import PreTrainedTokenizerFast

from internvl_hub.conversation import TemplateError, conversation_from_messages, get_template
from internvl_hub.image_processing_internvl import InternVLImageProcessor
from internvl_hub.modeling_internvl_chat import InternVLChatModel
from internvl_hub.processing_internvl import InternVLProcessor, PromptTooLongError
from internvl_hub.prompting_internvl import ImageCountError, TokenizerError, prompt_encoder

CHAT = Path(__file__).parent / "fixtures" / "chat"
NAMES = ["qwen2-internvl2_5", "internlm2-internlm2_chat", "llama-hermes2-vit6b", "phi3-phi3_chat"]
QWEN = NAMES[0]
IDS = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
PROMPT = {**IDS, "add_generation_prompt": True}


@cache
def model_of(name: str) -> InternVLChatModel:
    return InternVLChatModel.from_pretrained(CHAT / name).eval()


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(CHAT / name)


@cache
def processor_of(name: str) -> InternVLProcessor:
    return InternVLProcessor.from_model_config(model_of(name).config, tokenizer_of(name))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8))


SQUARE, WIDE, TALL = picture(60, 60), picture(130, 60, 1), picture(50, 160, 2)
TILES = {id(SQUARE): 1, id(WIDE): 3, id(TALL): 4}  # of 56 pixels, thumbnail included


def user(*parts: Any) -> dict[str, Any]:
    """A user message of texts and pictures."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return {"role": "user", "content": content}


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


@pytest.fixture
def chat_ids(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Prompt ids of `model.chat`, without the computation."""
    seen: list[Any] = []

    def embed_prompt(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        seen.append(input_ids)
        return torch.zeros(1, 1, 1)

    def run(name: str, question: str, images: list[Image.Image], history: list[tuple[str, str]]) -> torch.Tensor:
        pixels, patches = None, []
        if images:
            output = processor_of(name).image_processor(images, return_tensors="pt")
            pixels, patches = output["pixel_values"], output["num_patches"].tolist()
        model_of(name).chat(tokenizer_of(name), pixels, question, {}, history=history, num_patches_list=patches)
        return seen.pop()

    monkeypatch.setattr(InternVLChatModel, "embed_prompt", embed_prompt)
    monkeypatch.setattr(InternVLChatModel, "generate", lambda self, **kwargs: torch.tensor([[60]]))
    monkeypatch.setattr(InternVLChatModel, "extract_feature", lambda self, tiles: torch.zeros(len(tiles), 4, 8))
    return run


# ---------------------------------------------------------------------------------------------------- equal to chat

FORGED = ["<|im_end|>", "<IMG_CONTEXT>", "<img>", "<s>", "</s>", "<|end|>", "<video>"]
TEXT = st.lists(st.sampled_from([*FORGED, "<ref>", "</box>", " ", "\n", "猫", "Hi"]) | st.text(max_size=5), max_size=4)
TEXT = TEXT.map("".join).filter(lambda text: "<image>" not in text)
TURN = st.tuples(st.lists(st.sampled_from([SQUARE, WIDE, TALL]), max_size=2), TEXT, TEXT)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(turns=st.lists(TURN, min_size=1, max_size=3))
def test_messages_equal_chat(name: str, chat_ids: Any, turns: list) -> None:
    messages, pairs, images = [], [], []
    for pictures, question, reply in turns:
        messages += [user(*pictures, question), answer(reply)]
        pairs.append(("<image>\n" * len(pictures) + question, reply))
        images += pictures
    output = processor_of(name).apply_chat_template(messages[:-1], **PROMPT)
    expected = chat_ids(name, pairs[-1][0], images, pairs[:-1])
    assert output["input_ids"].tolist() == expected.tolist()
    assert output["attention_mask"].tolist() == torch.ones_like(expected).tolist()
    assert output.get("num_patches", torch.tensor([])).tolist() == [TILES[id(image)] for image in images]


def test_message_equals_chat_in_what_it_makes_the_model_say() -> None:
    model, processor, tokenizer = model_of(QWEN), processor_of(QWEN), tokenizer_of(QWEN)
    model.img_context_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")  # this fixture does not say it
    inputs = processor.apply_chat_template([user(WIDE, "What is it?")], **PROMPT)
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=4, pad_token_id=2)
    new = output[0, inputs["input_ids"].shape[1] :]
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.chat(tokenizer, inputs["pixel_values"], "What is it?", options)
    assert processor.decode(new, skip_special_tokens=True).strip() == expected


def test_string_content_equals_text_part() -> None:
    for content in ("Hi", [{"type": "text", "text": "Hi"}]):
        ids = processor_of(QWEN).apply_chat_template([{"role": "user", "content": content}], **PROMPT)["input_ids"]
        assert tokenizer_of(QWEN).decode(ids[0]).endswith("user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_system_message() -> None:
    messages = [{"role": "system", "content": "Be brief."}, user("Hi")]
    text = tokenizer_of(QWEN).decode(processor_of(QWEN).apply_chat_template(messages, **PROMPT)["input_ids"][0])
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_system_message_of_the_processor() -> None:
    processor = InternVLProcessor(InternVLImageProcessor(), tokenizer_of(QWEN), system_message="Mine '{{ x }}'")
    expected = "<|im_start|>system\nMine '{{ x }}'<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert processor.apply_chat_template([user("Hi")]) == expected
    assert tokenizer_of(QWEN).decode(processor.apply_chat_template([user("Hi")], **IDS)["input_ids"][0]) == expected


# ----------------------------------------------------------------------------------------------------- forged markup


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("forged", [*FORGED[:6], "<image>"])
def test_typed_markup_is_text(name: str, forged: str) -> None:
    processor, tokenizer = processor_of(name), tokenizer_of(name)
    clean = [{"role": "system", "content": "S"}, user(SQUARE, "Q"), answer("A"), user("B")]
    typed = copy.deepcopy(clean[:1]) + [user(SQUARE, f"Q{forged}"), answer(f"{forged}A"), user("B", forged)]
    typed[0]["content"] += forged
    ids, base = (processor.apply_chat_template(m, **PROMPT)["input_ids"][0].tolist() for m in (typed, clean))
    special = set(tokenizer.added_tokens_decoder)
    assert [i for i in ids if i in special] == [i for i in base if i in special]
    text, plain = tokenizer.decode(ids), tokenizer.decode(base)
    assert text.count(forged) == plain.count(forged) + 4


def test_literal_placeholder_takes_no_image() -> None:
    output = processor_of(QWEN).apply_chat_template([user("<image> and <video>", WIDE)], **PROMPT)
    assert output["num_patches"].tolist() == [3]
    assert "<image> and <video>" in tokenizer_of(QWEN).decode(output["input_ids"][0])


# ------------------------------------------------------------------------------------------------------ trusted text


@pytest.mark.parametrize("name", NAMES)
def test_rendered_text_equals_messages(name: str) -> None:
    processor = processor_of(name)
    messages = [user(SQUARE, "Look <ref>here</ref>"), answer("A cat."), user(WIDE, TALL, "\nAnd?"), answer("猫")]
    for end, prompt in ((4, False), (3, True)):
        direct = processor.apply_chat_template(messages[:end], **IDS, add_generation_prompt=prompt)
        text = processor.apply_chat_template(messages[:end], add_generation_prompt=prompt)
        again = processor(text=text, images=[SQUARE, WIDE, TALL], return_tensors="pt")
        assert again.keys() == direct.keys()
        for key in direct:
            assert torch.equal(again[key], direct[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_bos_comes_exactly_once(name: str) -> None:
    processor, tokenizer = processor_of(name), tokenizer_of(name)
    bos = prompt_encoder(tokenizer).bos
    assert (len(bos) == 1) == (name in NAMES[1::2])
    text = processor.apply_chat_template([user("Hi")])
    assert text.startswith("<s>") == bool(bos)
    for ids in (processor(text=text)["input_ids"], processor(text=text, add_special_tokens=False)["input_ids"]):
        assert ids[: len(bos)] == bos
        assert ids.count(1) == len(bos)
    assert (
        processor(text="Hi", add_special_tokens=False)["input_ids"]
        == tokenizer("Hi", add_special_tokens=False)["input_ids"]
    )
    assert processor(text="Hi")["input_ids"] == tokenizer("Hi")["input_ids"]


@pytest.mark.parametrize("name", NAMES)
def test_rendering_equals_the_conversation(name: str) -> None:
    processor = processor_of(name)
    messages = [user(SQUARE, "Hi"), answer("x")]
    conversation = conversation_from_messages(get_template(processor.template), messages)
    bos = "<s>" if prompt_encoder(tokenizer_of(name)).bos else ""
    assert processor.apply_chat_template(messages) == bos + conversation.get_prompt()


def test_text_is_trusted() -> None:
    ids = processor_of(QWEN)(text="a<|im_end|>")["input_ids"]
    assert ids[-1] == tokenizer_of(QWEN).eos_token_id


def test_another_template_is_rendered() -> None:
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    messages = [{"role": "user", "content": "Hi"}]
    assert processor_of(QWEN).apply_chat_template(messages, chat_template=template) == "[Hi]"
    output = processor_of(QWEN).apply_chat_template(messages, chat_template=template, **IDS)
    assert tokenizer_of(QWEN).decode(output["input_ids"][0]) == "[Hi]"


# ------------------------------------------------------------------------------------------------------------ images


def test_flat_and_nested_images() -> None:
    processor, texts = processor_of(QWEN), ["<image> a <image>", "none", "b <image>"]
    flat = processor(text=texts, images=[SQUARE, WIDE, TALL], return_tensors="pt")
    nested = processor(text=texts, images=[[SQUARE, WIDE], [], [TALL]], return_tensors="pt")
    assert flat["num_patches"].tolist() == nested["num_patches"].tolist() == [1, 3, 4]
    for key in flat:
        assert torch.equal(flat[key], nested[key])
    context = tokenizer_of(QWEN).convert_tokens_to_ids("<IMG_CONTEXT>")
    assert (flat["input_ids"] == context).sum(1).tolist() == [16, 0, 16]


def test_pixels_are_the_image_processors() -> None:
    processor = processor_of(QWEN)
    output = processor(text="<image><image>", images=[WIDE, SQUARE], return_tensors="pt")
    alone = processor.image_processor([WIDE, SQUARE], return_tensors="pt")
    assert torch.equal(output["pixel_values"], alone["pixel_values"])


@pytest.mark.parametrize(
    ("text", "images", "match"),
    [
        ("<image>", None, "text has 1 .* 0 image"),
        ("Hi", [SQUARE], "text has 0 .* 1 image"),
        ("<image><image>", [SQUARE], "text has 2 .* 1 image"),
        (["<image>", "<image>"], [SQUARE], "batch has 2 .* 1 image"),
        (["<image>", "Hi"], [[], [SQUARE]], "Prompt 0 has 1 .* 0 image"),
    ],
)
def test_image_counts(text: Any, images: Any, match: str) -> None:
    with pytest.raises(ImageCountError, match=match):
        processor_of(QWEN)(text=text, images=images)


@pytest.mark.parametrize("batched", [False, True])
def test_images_may_be_supplied_beside_the_messages(batched: bool) -> None:
    processor = processor_of(QWEN)
    bare = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
    full = processor.apply_chat_template([[user(WIDE, "Hi")]] if batched else [user(WIDE, "Hi")], **PROMPT)
    images = [[WIDE]] if batched else [WIDE]
    output = processor.apply_chat_template([bare] if batched else bare, **PROMPT, processor_kwargs={"images": images})
    for key in full:
        assert torch.equal(output[key], full[key])


def test_supplied_images_must_fit() -> None:
    bare = [{"role": "user", "content": [{"type": "image"}, {"type": "image", "image": WIDE}]}]
    with pytest.raises(ImageCountError, match="Conversation 0 has 1 .* 2 image"):
        processor_of(QWEN).apply_chat_template(bare, **PROMPT, images=[WIDE, WIDE])
    with pytest.raises(TemplateError, match="needs one of"):
        processor_of(QWEN).apply_chat_template(bare, **PROMPT)


def test_image_sources(tmp_path: Path) -> None:
    WIDE.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    encoded = base64.b64encode(data).decode()
    parts = [
        {"type": "image", "path": str(tmp_path / "a.png")},
        {"type": "image", "image": WIDE},
        {"type": "image", "base64": encoded},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
        {"type": "image", "url": str(tmp_path / "a.png")},
    ]
    output = processor_of(QWEN).apply_chat_template([{"role": "user", "content": parts}], **PROMPT)
    assert output["num_patches"].tolist() == [3] * len(parts)
    first, *others = output["pixel_values"].split(3)
    assert all(torch.equal(first, other) for other in others)


def test_image_settings_pass_through() -> None:
    output = processor_of(QWEN).apply_chat_template([user(WIDE, "Hi")], **PROMPT, processor_kwargs={"max_num": 1})
    assert output["num_patches"].tolist() == [1]
    output = processor_of(QWEN)(text="<image>", images=WIDE, images_kwargs={"use_thumbnail": False})
    assert output["num_patches"].tolist() == [2]


@pytest.mark.parametrize("text", ["Hi", "<image>"])
def test_unknown_options_are_refused(text: str) -> None:
    with pytest.raises(TypeError, match="paddng"):
        processor_of(QWEN)(text=text, images=[SQUARE] * text.count("<image>"), paddng=True)
    with pytest.raises(TypeError, match="tools"):
        processor_of(QWEN).apply_chat_template([user("Hi")], **PROMPT, tools=[{}])
    assert processor_of(QWEN).apply_chat_template([user("Hi")], **PROMPT, tools=None, documents=None)


def test_images_without_text_and_nothing() -> None:
    assert processor_of(QWEN)(images=[WIDE], return_tensors="pt").keys() == {"pixel_values", "num_patches"}
    with pytest.raises(ValueError, match="text, images or both"):
        processor_of(QWEN)()
    with pytest.raises(ValueError, match="audio"):
        processor_of(QWEN)(text="Hi", audio=[0.0])


# ------------------------------------------------------------------------------------------------------------- video

FRAMES = [picture(130, 60, seed) for seed in (5, 6, 7)]


def test_video_frames_have_prefixes_and_one_tile_each() -> None:
    processor, tokenizer = processor_of(QWEN), tokenizer_of(QWEN)
    parts = [{"type": "video", "video": FRAMES}, {"type": "image", "image": WIDE}, {"type": "text", "text": "Hi"}]
    output = processor.apply_chat_template([{"role": "user", "content": parts}], **PROMPT)
    assert output["num_patches"].tolist() == [1, 1, 1, 3]
    frame = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>"
    lines = "".join(f"Frame-{i}: {frame}\n" for i in (1, 2, 3))
    picture_text = "<img>" + "<IMG_CONTEXT>" * 12 + "</img>\n"
    assert f"user\n{lines}{picture_text}Hi<|im_end|>" in tokenizer.decode(output["input_ids"][0])
    alone = processor.image_processor(FRAMES, return_tensors="pt", dynamic_image_size=False)["pixel_values"]
    assert torch.equal(output["pixel_values"][:3], alone)


@pytest.mark.parametrize("videos", [FRAMES, [FRAMES], [[FRAMES]]])
def test_video_beside_text(videos: Any) -> None:
    parts = [{"type": "video", "video": FRAMES}, {"type": "text", "text": "Hi"}]
    direct = processor_of(QWEN).apply_chat_template([{"role": "user", "content": parts}], **PROMPT)
    marked = [{"role": "user", "content": "<video>\nHi"}]
    text = processor_of(QWEN).apply_chat_template(marked, add_generation_prompt=True)
    output = processor_of(QWEN)(text=text, videos=videos, return_tensors="pt")
    for key in direct:
        assert torch.equal(output[key], direct[key]), key


def test_video_placeholder_without_videos_is_text() -> None:
    assert tokenizer_of(QWEN).decode(processor_of(QWEN)(text="a <video> b")["input_ids"]) == "a <video> b"


# -------------------------------------------------------------------------------------------- padding, length, output


@pytest.mark.parametrize("side", ["left", "right", None])
def test_padding_sides(side: str | None) -> None:
    processor, tokenizer = processor_of(QWEN), tokenizer_of(QWEN)
    texts = ["a", "a longer one than that"]
    output = processor(text=texts, return_tensors="pt", padding=True, **({"padding_side": side} if side else {}))
    rows = [tokenizer(text)["input_ids"] for text in texts]
    gap = [tokenizer.pad_token_id] * (len(rows[1]) - len(rows[0]))
    assert output["input_ids"].tolist() == [rows[0] + gap if side == "right" else gap + rows[0], rows[1]]
    mask = [0] * len(gap), [1] * len(rows[0])
    assert output["attention_mask"][0].tolist() == (mask[1] + mask[0] if side == "right" else mask[0] + mask[1])
    assert tokenizer.padding_side == PreTrainedTokenizerFast.from_pretrained(CHAT / QWEN).padding_side


def test_padding_to_a_length_and_none() -> None:
    processor = processor_of(QWEN)
    output = processor(text="abc", padding="max_length", max_length=30, return_tensors="pt")
    assert output["input_ids"].shape == (1, 30)
    assert output["attention_mask"].sum() == len(tokenizer_of(QWEN)("abc")["input_ids"])
    ragged = processor(text=["a", "a longer one"], padding=False)["input_ids"]
    assert ragged == tokenizer_of(QWEN)(["a", "a longer one"])["input_ids"]


def test_padding_needs_a_pad_token() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(CHAT / QWEN)
    tokenizer.pad_token = None
    processor = InternVLProcessor(InternVLImageProcessor(image_size=56), tokenizer, num_image_token=4)
    with pytest.raises(TokenizerError, match="pad token"):
        processor(text=["a", "a longer one"], padding=True)
    assert len(processor(text=["ab", "ab"], padding=True)["input_ids"]) == 2


def test_too_long_prompts_are_refused_not_cut() -> None:
    processor = processor_of(QWEN)
    length = processor.apply_chat_template([user(WIDE, "Hi")], **PROMPT)["input_ids"].shape[1]
    assert processor.apply_chat_template([user(WIDE, "Hi")], **PROMPT, processor_kwargs={"max_length": length})
    for options in ({}, {"truncation": True}):
        with pytest.raises(PromptTooLongError, match=f"{length} tokens, more than max_length {length - 1}"):
            processor.apply_chat_template(
                [user(WIDE, "Hi")], **PROMPT, processor_kwargs={"max_length": length - 1, **options}
            )


def test_output_kinds() -> None:
    processor, messages = processor_of(QWEN), [user(WIDE, "Hi")]
    tensors = processor.apply_chat_template(messages, **PROMPT)
    arrays = processor.apply_chat_template(messages, **{**PROMPT, "return_tensors": "np"})
    plain = {"tokenize": True, "add_generation_prompt": True}
    lists = processor.apply_chat_template(messages, return_dict=True, **plain)
    for key, value in tensors.items():
        assert isinstance(arrays[key], np.ndarray)
        assert np.array_equal(arrays[key], value.numpy())
    assert lists["input_ids"] == tensors["input_ids"][0].tolist()
    assert processor.apply_chat_template(messages, **plain) == lists["input_ids"]
    several = processor.apply_chat_template([messages] * 2, return_dict=True, **plain)
    assert several["input_ids"] == [lists["input_ids"]] * 2
    with pytest.raises(ValueError, match="return_tensors"):
        processor(text="Hi", return_tensors="tf")


def test_batches_of_messages_equal_single_ones() -> None:
    processor = processor_of(QWEN)
    long = [user("Hello"), answer("x"), user(SQUARE, TALL, "longer than that")]
    conversations = [[user(WIDE, "Hi")], long, [user("?")]]
    output = processor.apply_chat_template(conversations, **PROMPT)
    tiles = []
    for row, conversation in enumerate(conversations):
        alone = processor.apply_chat_template(conversation, **PROMPT)
        length = alone["input_ids"].shape[1]
        assert output["input_ids"][row, -length:].tolist() == alone["input_ids"][0].tolist()
        assert output["attention_mask"][row].sum() == length
        tiles += list(alone.get("pixel_values", []))
    assert torch.equal(output["pixel_values"], torch.stack(tiles))


# ------------------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", ["Once upon", [{"type": "text", "text": "Once upon"}]])
def test_final_message_can_be_continued(name: str, content: Any) -> None:
    processor = processor_of(name)
    final = [user("Tell"), {"role": "assistant", "content": content}]
    prompt = processor.apply_chat_template(final[:1], **PROMPT)["input_ids"][0].tolist()
    open_end = processor.apply_chat_template(final, **IDS, continue_final_message=True)["input_ids"][0].tolist()
    prefix = get_template(processor.template).answer_prefix
    more = tokenizer_of(name)(f"{prefix}Once upon", add_special_tokens=False)["input_ids"]
    assert open_end == prompt + more


def test_what_cannot_be_continued() -> None:
    processor = processor_of(QWEN)
    with pytest.raises(TemplateError, match="assistant message"):
        processor.apply_chat_template([user("Tell")], **IDS, continue_final_message=True)
    with pytest.raises(ValueError, match="add_generation_prompt"):
        processor.apply_chat_template([user("Q"), answer("A")], **PROMPT, continue_final_message=True)


@pytest.mark.parametrize("name", NAMES)
def test_assistant_mask_marks_answers(name: str) -> None:
    processor, tokenizer = processor_of(name), tokenizer_of(name)
    messages = [user(WIDE, "Hi"), answer("A cat."), user("Sure?"), answer("Yes.")]
    output = processor.apply_chat_template(messages, **IDS, return_assistant_tokens_mask=True)
    plain = processor.apply_chat_template(messages, **IDS)
    assert torch.equal(output["input_ids"], plain["input_ids"])
    kept = output["input_ids"][output["assistant_masks"].bool()]
    end = get_template(processor.template).end_of_turn
    assert tokenizer.decode(kept) == f"A cat.{end}Yes.{end}"


def test_assistant_mask_is_padded_along() -> None:
    rows = [[user("Hi"), answer("A longer answer than the other")], [user("Hi"), answer("B")]]
    output = processor_of(QWEN).apply_chat_template(rows, **IDS, return_assistant_tokens_mask=True)
    assert output["assistant_masks"].shape == output["input_ids"].shape
    kept = output["input_ids"][1][output["assistant_masks"][1].bool()]
    assert tokenizer_of(QWEN).decode(kept) == "B<|im_end|>"


def test_unknown_template_is_refused() -> None:
    with pytest.raises(TemplateError, match="'nope'"):
        InternVLProcessor(InternVLImageProcessor(), tokenizer_of(QWEN), template="nope")


def test_messages_stay_as_they_were() -> None:
    messages = [user("Hi", WIDE), answer("x"), user("y")]
    before = copy.deepcopy([{**m, "content": str(m["content"])} for m in messages])
    processor_of(QWEN).apply_chat_template(messages, **PROMPT)
    assert [{**m, "content": str(m["content"])} for m in messages] == before


# -------------------------------------------------------------------------------------------------------- remote code

REMOTE = """
import json, sys
sys.modules["internvl_hub"] = None  # the package must not be needed
import torch
import transformers as tf
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor

folder, picture = sys.argv[1:]
image = Image.open(picture)
trusted = {"trust_remote_code": True}
processor = tf.AutoProcessor.from_pretrained(folder, **trusted)
images = AutoImageProcessor.from_pretrained(folder, **trusted)
tokenizer = tf.AutoTokenizer.from_pretrained(folder, **trusted)
options = {"max_new_tokens": 8, "do_sample": False}
report = {"classes": {}}
pixels = images([image], return_tensors="pt")["pixel_values"]
for auto in (tf.AutoModel, tf.AutoModelForCausalLM, tf.AutoModelForImageTextToText):
    model = auto.from_pretrained(folder, **trusted).eval()
    report["classes"][auto.__name__] = type(model).__name__
    report.setdefault("answers", []).append(model.chat(tokenizer, pixels, "What is it?", options))
parts = [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]
messages = [{"role": "user", "content": parts}]
prompt = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
inputs = processor.apply_chat_template(messages, **prompt)
report["ids"] = inputs["input_ids"].tolist()
report["pixels"] = pixels.double().sum().item()
report["tokenizer"] = tokenizer("a<|im_end|> b")["input_ids"]
report["template"] = processor.chat_template
pipe = tf.pipeline("image-text-to-text", model=folder, **trusted)
settings = {"generate_kwargs": options, "return_full_text": False}
report["chat"] = pipe(text=messages, **settings)
report["chats"] = pipe(text=[messages, [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]], **settings)
text = processor.apply_chat_template(messages, add_generation_prompt=True)
report["text"] = pipe(images=[image], text=text, **settings)
report["texts"] = pipe(images=[[image], [image]], text=[text, text], batch_size=2, **settings)
report["modules"] = sorted({type(part).__module__.split(".")[0] for part in (model, processor, images)})
def plain(value):
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value["generated_text"] if isinstance(value, dict) else value
for key in ("chat", "chats", "text", "texts"):
    report[key] = plain(report[key])
print("REPORT" + json.dumps(report))
"""


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process without the package makes of a saved checkpoint."""
    folder, work = tmp_path_factory.mktemp("saved"), tmp_path_factory.mktemp("work")
    model = copy.deepcopy(model_of(QWEN))
    model.generation_config.eos_token_id = 4
    model.config.img_context_token_id = tokenizer_of(QWEN).convert_tokens_to_ids("<IMG_CONTEXT>")
    model.save_pretrained(folder)
    processor_of(QWEN).save_pretrained(folder)
    WIDE.save(work / "wide.png")
    environment = {**os.environ, "HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-c", REMOTE, str(folder), str(work / "wide.png")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=work, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.split("REPORT")[1])


@pytest.fixture
def said() -> str:
    """The answer of the model in this process."""
    pixels = processor_of(QWEN).image_processor([WIDE], return_tensors="pt")["pixel_values"]
    options = {"max_new_tokens": 8, "do_sample": False}
    return model_of(QWEN).chat(tokenizer_of(QWEN), pixels, "What is it?", options)


def test_remote_classes(remote: dict) -> None:
    assert remote["classes"] == dict.fromkeys(
        ["AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"], "InternVLChatModel"
    )
    assert remote["modules"] == ["transformers_modules"]


def test_remote_chat(remote: dict, said: str) -> None:
    assert remote["answers"] == [said] * 3


def test_remote_processor(remote: dict) -> None:
    here = processor_of(QWEN).apply_chat_template([user(WIDE, "What is it?")], **PROMPT)
    assert remote["ids"] == here["input_ids"].tolist()
    assert remote["pixels"] == here["pixel_values"].double().sum().item()
    assert remote["tokenizer"] == tokenizer_of(QWEN)("a<|im_end|> b")["input_ids"]
    assert remote["template"] == processor_of(QWEN).chat_template


@pytest.mark.parametrize("form", ["chat", "text"])
def test_remote_pipeline(remote: dict, said: str, form: str) -> None:
    (text,) = remote[form]
    assert text.strip() == said


def test_remote_pipeline_on_batches(remote: dict, said: str) -> None:
    options = {"max_new_tokens": 8, "do_sample": False}
    greeting = model_of(QWEN).chat(tokenizer_of(QWEN), None, "Hi", options)
    chats = [text if isinstance(text, str) else text[0] for text in remote["chats"]]
    assert [text.strip() for text in chats] == [said, greeting]
    texts = [text if isinstance(text, str) else text[0] for text in remote["texts"]]
    assert [text.strip() for text in texts] == [said] * 2


@pytest.mark.parametrize("name", NAMES)
def test_save_and_load(name: str, tmp_path: Path) -> None:
    before = processor_of(name)
    before.save_pretrained(tmp_path)
    after = InternVLProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    for field in ("template", "num_image_token", "system_message", "chat_template"):
        assert getattr(after, field) == getattr(before, field)
    one, two = (p.apply_chat_template([user(WIDE, TALL, "Hi")], **PROMPT) for p in (before, after))
    for key in one:
        assert torch.equal(one[key], two[key])


def test_pictures_of_this_file_have_the_tiles_they_should() -> None:
    output = processor_of(QWEN).image_processor([SQUARE, WIDE, TALL], return_tensors="pt")
    assert output["num_patches"].tolist() == list(TILES.values())
    buffer = io.BytesIO()
    WIDE.save(buffer, "png")
    assert processor_of(QWEN)(text="<image>", images=[buffer.getvalue()])["num_patches"].tolist() == [3]
