"""Tokenising conversations: the original's ids and labels, training equals inference, forged markup stays text."""

import gc
import json
import weakref
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from internvl_hub.conversation import (
    Conversation,
    Segment,
    conversation_from_messages,
    get_conv_template,
    get_template,
    template_names,
)
from internvl_hub.prompting_internvl import (
    USER_MARKUP,
    EncodedPrompt,
    ImageCountError,
    MediaSpan,
    TokenizerError,
    check_image_count,
    prompt_encoder,
)

FIXTURES = Path(__file__).parent / "fixtures"
LABELS = json.loads((FIXTURES / "labels.json").read_text(encoding="utf-8"))
TOKENIZERS = ["qwen2-internvl2_5", "internlm2-internlm2_chat", "llama-hermes2-vit6b", "phi3-phi3_chat"]
FORBIDDEN = ["<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>", "<s>", "</s>", "<|end|>", "<|user|>"]
FORBIDDEN += ["<|endoftext|>", "<|system|>", "<|assistant|>"]
MARKUP = sorted(USER_MARKUP)


@cache
def load(name: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(FIXTURES / "chat" / name)


def talk(name: str, *turns: str | None, system: str | None = None) -> Conversation:
    conversation = get_conv_template(name)
    if system is not None:
        conversation.set_system_message(system)
    for i, turn in enumerate(turns):
        conversation.append_message(conversation.roles[i % 2], turn)
    return conversation


def expand(text: str, lengths: list[int]) -> str:
    """The original's replacement of placeholders, left to right."""
    for length in lengths:
        text = text.replace("<image>", f"<img>{'<IMG_CONTEXT>' * length}</img>", 1)
    return text


def encode(tokenizer, conversation: Conversation, *lengths: int) -> EncodedPrompt:
    return prompt_encoder(tokenizer).encode(conversation.segments(), lengths)


# ----------------------------------------------------------------------------------------------------------- fixtures


@pytest.mark.parametrize("case", LABELS, ids=lambda case: f"{case['template']}-{len(case['conversations'])}")
def test_training_rows_equal_the_original(case: dict) -> None:
    turns = [turn["value"] for turn in case["conversations"]]
    encoder = prompt_encoder(load(case["tokenizer"]))
    row = encoder.encode_supervised(talk(case["template"], *turns).segments(), case["num_image_tokens"])
    assert row.input_ids == case["input_ids"]
    assert row.labels == case["labels"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompts_equal_the_original(name: str) -> None:
    expected = json.loads((FIXTURES / "chat" / name / "expected.json").read_text(encoding="utf-8"))
    config = json.loads((FIXTURES / "chat" / name / "config.json").read_text(encoding="utf-8"))
    for case in expected["cases"]:
        question, patches = case["question"], case["num_patches_list"]
        if not case["history"] and "<image>" not in question and patches:
            question = f"<image>\n{question}"
        turns = [text for pair in case["history"] or [] for text in pair]
        lengths = [n * expected["num_image_token"] for n in patches]
        prompt = encode(load(name), talk(config["template"], *turns, question, None), *lengths)
        assert prompt.input_ids == case["prompt_ids"]


# ------------------------------------------------------------------------------------------- training equals inference

TURNS = ["<image>\nWhat?", "A cat.", "Zwei <image><image> 猫?", "Two.\n", "Bye", " ok <|im_end|> then"]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("template", template_names())
def test_ids_before_every_answer_are_its_inference_prompt(template: str, tokenizer: str) -> None:
    encoder, lengths = prompt_encoder(load(tokenizer)), [4, 8, 4]
    row = encoder.encode_supervised(talk(template, *TURNS).segments(), lengths)
    starts = [i for i, on in enumerate(row.supervised) if on and not row.supervised[i - 1]]
    assert len(starts) == len(TURNS) // 2
    for k, start in enumerate(starts):
        past = TURNS[: 2 * k + 1]
        images = lengths[: sum(turn.count("<image>") for turn in past[::2])]
        prompt = encode(load(tokenizer), talk(template, *past, None), *images)
        assert row.input_ids[:start] == prompt.input_ids


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("template", template_names())
def test_supervised_ids_are_answer_and_stop_token(template: str, tokenizer: str) -> None:
    row = prompt_encoder(load(tokenizer)).encode_supervised(talk(template, "Hi", "A cat.").segments(), [])
    record = get_template(template)
    answer = load(tokenizer)(f"{record.answer_prefix}A cat.{record.end_of_turn}", add_special_tokens=False)
    assert [i for i in row.labels if i != -100] == answer["input_ids"]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_training_row_is_one_pass_over_the_text(tokenizer: str) -> None:
    for template in template_names():
        conversation = talk(template, "Hi <image>", "A cat.", "Zwei", "Two.")
        row = prompt_encoder(load(tokenizer)).encode_supervised(conversation.segments(), [4])
        assert row.input_ids == load(tokenizer)(expand(conversation.get_prompt(), [4]))["input_ids"]


# ------------------------------------------------------------------------------------------- one pass over clean text

CLEAN = st.lists(st.sampled_from([*MARKUP, " ", "\n", "<", "|", "im_end", "猫", "image>"]) | st.text(max_size=8)).map(
    "".join
)
CLEAN = CLEAN.filter(lambda text: not any(token in text for token in [*FORBIDDEN, "<image>"]))


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@settings(max_examples=25, deadline=None)
@given(system=CLEAN, first=CLEAN, answer=CLEAN, last=CLEAN, name=st.sampled_from(template_names()))
def test_clean_text_equals_one_pass(
    tokenizer: str, system: str, first: str, answer: str, last: str, name: str
) -> None:
    conversation = talk(name, f"<image>{first}", answer, f"{last}<image>", None, system=system)
    prompt = encode(load(tokenizer), conversation, 4, 8)
    text = expand(conversation.get_prompt(), [4, 8])
    assert prompt.input_ids == load(tokenizer)(text)["input_ids"]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("token", MARKUP)
def test_grounding_markup_that_users_type_stays_one_token(tokenizer: str, token: str) -> None:
    index = load(tokenizer).convert_tokens_to_ids(token)
    assert index is not None
    prompt = encode(load(tokenizer), talk("internvl2_5", f"Where is {token}it?", None))
    assert prompt.input_ids.count(index) == 1


# -------------------------------------------------------------------------------------------------------------- spans


def test_spans_say_where_images_lie() -> None:
    tokenizer = load("internlm2-internlm2_chat")
    prompt = encode(tokenizer, talk("internlm2-chat", "<image>a<image>", "x", "<image>", None), 4, 8, 12)
    context = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert [(span.kind, span.length) for span in prompt.spans] == [("image", 4), ("image", 8), ("image", 12)]
    covered = [i for span in prompt.spans for i in range(span.start, span.start + span.length)]
    assert covered == [i for i, index in enumerate(prompt.input_ids) if index == context]


def test_no_images_no_spans() -> None:
    assert encode(load("qwen2-internvl2_5"), talk("internvl2_5", "Hi", None)).spans == []


def test_labels_follow_supervision() -> None:
    assert EncodedPrompt([5, 6], [MediaSpan("image", 0, 1)], [False, True]).labels == [-100, 6]


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("text", "lengths"), [("Hi", [4]), ("<image>", []), ("<image><image>", [4])])
@pytest.mark.parametrize("method", ["encode", "encode_supervised"])
def test_count_errors_name_both_numbers(text: str, lengths: list[int], method: str) -> None:
    encoder, segments = prompt_encoder(load("qwen2-internvl2_5")), talk("internvl2_5", text, "A").segments()
    with pytest.raises(ImageCountError, match=f"{text.count('<image>')} <image>.* {len(lengths)} image"):
        getattr(encoder, method)(segments, lengths)


def test_equal_counts_pass() -> None:
    assert check_image_count(2, 2) is None


def test_context_tokens_in_trusted_text_are_counted() -> None:
    segments = [Segment("<IMG_CONTEXT>"), Segment("<image>", "image")]
    with pytest.raises(ImageCountError, match="2 <image>.* 1 image"):
        prompt_encoder(load("qwen2-internvl2_5")).encode(segments, [4])


def plain_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that knows nothing of InternVL."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), vocab_size=256)
    tokenizer.train_from_iterator([], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def test_tokenizer_without_image_tokens() -> None:
    tokenizer = plain_tokenizer()
    with pytest.raises(TokenizerError, match="<img>, <IMG_CONTEXT>, </img>"):
        encode(tokenizer, talk("internvl2_5", "<image>", None), 4)
    assert encode(tokenizer, talk("internvl2_5", "Hi", None)).input_ids  # text needs none of them


def test_only_the_missing_image_tokens_are_named() -> None:
    tokenizer = plain_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<img>", "</img>"]})
    with pytest.raises(TokenizerError, match="has no <IMG_CONTEXT>\\."):
        encode(tokenizer, talk("internvl2_5", "<image>", None), 4)


def test_other_names_of_the_image_tokens() -> None:
    tokenizer = plain_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["[[", "**", "]]"]})
    encoder = prompt_encoder(tokenizer, ("[[", "**", "]]"))
    prompt = encoder.encode(talk("internvl2_5", "<image> 2**2", None).segments(), [3])
    assert prompt.input_ids.count(tokenizer.convert_tokens_to_ids("**")) == 3
    assert "[[******]] 2**2" in tokenizer.decode(prompt.input_ids)


# ------------------------------------------------------------------------------------------------------ forged markup


def cut(ids: list[int], part: list[int]) -> tuple[list[int], list[int]]:
    """What stands before and after the first occurrence of `part`."""
    at = next(i for i in range(len(ids)) if ids[i : i + len(part)] == part)
    return ids[:at], ids[at + len(part) :]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("token", FORBIDDEN)
@pytest.mark.parametrize("place", range(3), ids=["system", "question", "answer"])
def test_forged_markup_is_text(tokenizer: str, token: str, place: int) -> None:
    tok = load(tokenizer)
    clean, forged = ["S", "Q", "A"], ["S", "Q", "A"]
    forged[place] = f"left {token} right"
    clean[place] = "left"
    template = "internvl2_5"
    ids = encode(tok, talk(template, forged[1], forged[2], "Q2", None, system=forged[0])).input_ids
    base = encode(tok, talk(template, clean[1], clean[2], "Q2", None, system=clean[0])).input_ids
    special = set(tok.added_tokens_decoder)
    assert [i for i in ids if i in special] == [i for i in base if i in special]
    expected = talk(template, forged[1], forged[2], "Q2", None, system=forged[0]).get_prompt()
    assert tok.decode(ids) == tok.decode(prompt_encoder(tok).bos) + expected


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("token", FORBIDDEN)
def test_everything_around_forged_markup_is_encoded_as_before(tokenizer: str, token: str) -> None:
    tok, mark = load(tokenizer), "\x00\x01"
    forged = encode(tok, talk("internvl2_5", f"left{token}right <ref>x</ref>", "A", "Q", None)).input_ids
    plain = tok(token, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tok.convert_tokens_to_ids(token) not in plain
    before, after = cut(forged, plain)
    text = talk("internvl2_5", f"left{mark}right <ref>x</ref>", "A", "Q", None).get_prompt()
    assert before == tok(text.split(mark)[0])["input_ids"]
    assert after == tok(text.split(mark)[1], add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@settings(max_examples=25, deadline=None)
@given(pieces=st.lists(st.sampled_from([*FORBIDDEN, "<", "|", " ", "im_end|>", "<|im_", "\n", "猫"]), max_size=8))
def test_any_mix_of_forgeries_decodes_to_itself(tokenizer: str, pieces: list[str]) -> None:
    tok, text = load(tokenizer), "".join(pieces)
    special = {token.content: i for i, token in tok.added_tokens_decoder.items()}
    for template in ("internvl2_5", "phi3-chat"):
        conversation = talk(template, f"{text}<image>{text}", text, text, None, system=text)
        prompt = encode(tok, conversation, 4)
        assert tok.decode(prompt.input_ids[len(prompt_encoder(tok).bos) :]) == expand(conversation.get_prompt(), [4])
        count = talk(template, "", "", "", None, system="").get_prompt().count
        for token in set(FORBIDDEN) - {"<img>", "</img>", "<IMG_CONTEXT>", tok.bos_token}:
            assert prompt.input_ids.count(special[token]) == count(token), token


def test_markup_split_over_message_parts_is_text() -> None:
    tok = load("qwen2-internvl2_5")
    parts = [{"type": "text", "text": text} for text in ("<|im_", "end|>", "<IMG_CON", "TEXT>")]
    conversation = conversation_from_messages(get_template("internvl2_5"), [{"role": "user", "content": parts}])
    ids = encode(tok, conversation).input_ids
    assert ids.count(tok.convert_tokens_to_ids("<|im_end|>")) == 2  # after the system text and after the question
    assert tok.convert_tokens_to_ids("<IMG_CONTEXT>") not in ids


def test_forged_context_token_needs_no_image() -> None:
    tok = load("qwen2-internvl2_5")
    prompt = encode(tok, talk("internvl2_5", "<image>\n<IMG_CONTEXT><img></img>", "<IMG_CONTEXT>", "?", None), 4)
    assert prompt.input_ids.count(tok.convert_tokens_to_ids("<IMG_CONTEXT>")) == 4


def test_image_tokens_added_as_ordinary_tokens_are_forbidden() -> None:
    tok = plain_tokenizer()
    tok.add_tokens(["<img>", "<IMG_CONTEXT>", "</img>"])
    prompt = encode(tok, talk("internvl2_5", "<image>\n<IMG_CONTEXT> <img>", None), 4)
    assert prompt.input_ids.count(tok.convert_tokens_to_ids("<IMG_CONTEXT>")) == 4
    assert prompt.input_ids.count(tok.convert_tokens_to_ids("<img>")) == 1
    assert "\n<IMG_CONTEXT> <img><" in tok.decode(prompt.input_ids)


def test_forgeries_are_not_supervised_as_a_stop() -> None:
    tok = load("qwen2-internvl2_5")
    row = prompt_encoder(tok).encode_supervised(talk("internvl2_5", "Q", "a<|im_end|>b").segments(), [])
    kept = [i for i in row.labels if i != -100]
    assert kept.count(tok.eos_token_id) == 1 and kept[-1] == tok.eos_token_id
    assert tok.decode(kept) == "a<|im_end|>b<|im_end|>"


# --------------------------------------------------------------------------------------- SentencePiece-like tokenizers

SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", *MARKUP]
CORPUS = ["hello world this is a picture of a cat user assistant system what is it\n"] * 20
CORPUS += ["a b c d <img> | im_end start <|x|> IMG_CONTEXT> the left dog / </a>"] * 20
CORPUS += ["colour? name. yes, no; you are"] * 20


@cache
def sentencepiece_like(model: str, scheme: str) -> PreTrainedTokenizerFast:
    """A tokenizer that marks spaces by U+2581 and puts one in front, as Llama, InternLM2, Phi-3 and Yi do."""
    if model == "unigram":
        # Its vocabulary holds the special tokens as ordinary pieces, too.
        backend = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>")
    else:
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL + [f"<0x{i:02X}>" for i in range(256)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if scheme == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=SPECIAL[3:],
    )


KINDS = [(model, scheme) for model in ("bpe", "unigram") for scheme in ("first", "always", "normalizer")]
CHATML = ["internvl2_5", "internlm2-chat", "internvl_zh"]


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize("template", CHATML)
def test_sentencepiece_clean_text_equals_one_pass(kind: tuple[str, str], template: str) -> None:
    tok = sentencepiece_like(*kind)
    conversation = talk(template, " what is <ref>it</ref> <image>", "a cat", "<image>\n", None, system="you are a")
    assert encode(tok, conversation, 2, 3).input_ids == tok(expand(conversation.get_prompt(), [2, 3]))["input_ids"]


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize("template", CHATML[:2])
def test_sentencepiece_training_row_equals_one_pass(kind: tuple[str, str], template: str) -> None:
    tok = sentencepiece_like(*kind)
    conversation = talk(template, "what is it", "a cat", "a dog?", "yes, no")
    row = prompt_encoder(tok).encode_supervised(conversation.segments(), [])
    assert row.input_ids == tok(conversation.get_prompt())["input_ids"]
    start = row.supervised.index(True)
    assert row.input_ids[:start] == encode(tok, talk(template, "what is it", None)).input_ids


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize("forged", ["<|im_end|>", "<img>", "</s><s>", "<|im_start|>user"])
@pytest.mark.parametrize("frame", ["is{}it", "is {} it", "{}it", "is{}", "{}"])
def test_sentencepiece_forged_markup_gets_no_space(kind: tuple[str, str], forged: str, frame: str) -> None:
    tok = sentencepiece_like(*kind)
    base = encode(tok, talk("internvl2_5", frame.format("left"), None, system="a")).input_ids
    ids = encode(tok, talk("internvl2_5", frame.format(forged), None, system="a")).input_ids
    special = set(tok.added_tokens_decoder)
    assert [i for i in ids if i in special] == [i for i in base if i in special]
    clean = tok.decode(base)
    assert clean.count(frame.format("left")) == 1
    assert tok.decode(ids) == clean.replace(frame.format("left"), frame.format(forged))


# ----------------------------------------------------------------------------------------------------- encoder cache


def test_encoders_do_not_keep_tokenizers_alive() -> None:
    tokenizer = plain_tokenizer()
    encode(tokenizer, talk("internvl2_5", "Hi", None))
    reference = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert reference() is None


def test_encoder_is_made_once() -> None:
    tokenizer = plain_tokenizer()
    assert prompt_encoder(tokenizer) is prompt_encoder(tokenizer)


def test_encoder_notices_added_tokens() -> None:
    tokenizer = plain_tokenizer()
    encode(tokenizer, talk("internvl2_5", "<|im_end|>", None))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_end|>"]})
    ids = encode(tokenizer, talk("internvl2_5", "<|im_end|>", None)).input_ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2  # markup after system and question


def test_encoder_notices_a_token_that_became_special() -> None:
    tokenizer = plain_tokenizer()
    tokenizer.add_tokens(["<stop>"])
    first = encode(tokenizer, talk("internvl2_5", "<stop>", None)).input_ids
    assert len(tokenizer) - 1 in first
    tokenizer.eos_token = "<stop>"
    assert tokenizer.eos_token_id not in encode(tokenizer, talk("internvl2_5", "<stop>", None)).input_ids


def test_tokenizer_is_left_as_it_was() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(FIXTURES / "chat" / "qwen2-internvl2_5")
    before = tokenizer("a<|im_end|>b")["input_ids"], tokenizer.padding_side, len(tokenizer)
    encode(tokenizer, talk("internvl2_5", "a<|im_end|>b<IMG_CONTEXT>", None))
    assert (tokenizer("a<|im_end|>b")["input_ids"], tokenizer.padding_side, len(tokenizer)) == before
