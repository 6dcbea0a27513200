"""Features of preference rows against the inference prompt, plain tokenisation and the features of ordinary rows."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import CHAT, CHECKPOINTS, chat_config
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from internvl_hub.conversation import template_names
from internvl_hub.data.augmentation import Take
from internvl_hub.data.dataset import ConversationDataset
from internvl_hub.data.features import FeatureMaker, Features, SequenceTooLongError, to_conversation
from internvl_hub.data.media import RowSettings, spell_out
from internvl_hub.data.mixture import DataSource, Mixture
from internvl_hub.data.pairs import PairRecord, parse_pair
from internvl_hub.data.preference_dataset import PreferenceDataset
from internvl_hub.data.records import FrameSampling, Message, Record, RecordError, Video
from internvl_hub.data.skipped import Skipped
from internvl_hub.prompting_internvl import prompt_encoder
from internvl_hub.tests.training import tiny_models as tiny

# The template that each fixture checkpoint names.
TEMPLATES = [(name, json.loads((CHAT / name / "config.json").read_text())["template"]) for name in CHECKPOINTS]
KEYS = ("input_ids", "labels")


@cache
def maker_of(checkpoint: str, template: str) -> FeatureMaker:
    tokenizer = AutoTokenizer.from_pretrained(CHAT / checkpoint)
    config = chat_config(
        template=template,
        force_image_size=28,
        img_context_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )
    return FeatureMaker(tokenizer, tiny.image_processor(), config)


def maker(kind: str = "qwen2") -> FeatureMaker:
    return FeatureMaker(tiny.tokenizer(kind), tiny.image_processor(), tiny.config(kind))


def pair(
    *texts: str, rejected: str = "No.", system: str | None = None, where: str = "rows:1", **media: Any
) -> PairRecord:
    """Human and gpt in turn, the last text being the chosen answer."""
    turns = [Message(("human", "gpt")[i % 2], text) for i, text in enumerate(texts)]
    turns = [] + ([Message("system", system)] if system is not None else []) + turns
    chosen, other = (*turns,), (*turns[:-1], Message("gpt", rejected))
    return PairRecord(*(Record(messages, where=where, **media) for messages in (chosen, other)))


def film(count: int = 4, **wish: Any) -> Video:
    frames = tuple(tiny.picture(50 + k, (40, 30)) for k in range(count))
    return Video(frames, frames=FrameSampling(**wish))  # type: ignore[arg-type]


def sequence(features: Features, name: str) -> tuple[list[int], list[int]]:
    return tuple(features[f"{name}_{key}"].tolist() for key in KEYS)  # type: ignore[return-value]


def prompt_ids(maker: FeatureMaker, record: Record, tiles: list[int], counts: list[int]) -> list[int]:
    """What chat would encode for the conversation without its last answer."""
    conversation = to_conversation(record, maker.config, spell_out(record, counts))
    conversation.messages[-1][1] = None
    lengths = [sum(maker.config.tokens_per_tile(count)) for count in tiles]
    return prompt_encoder(maker.tokenizer).encode(conversation.segments(), lengths).input_ids


# -------------------------------------------------------------------------------------------------------------- prompt


TEXT = st.text("aB1 .,\n<|>/猫é", min_size=1, max_size=12) | st.sampled_from(
    ["<|im_end|>", "<|end|>", " lead", "trail ", "\n", "<image> said", "</s>", "<IMG_CONTEXT>", "Yes.\n"]
)
ANSWER = TEXT.filter(str.strip)


@pytest.mark.parametrize(("checkpoint", "template"), TEMPLATES, ids=[template for _, template in TEMPLATES])
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), max_size=2), TEXT, ANSWER, ANSWER, st.none() | TEXT, st.booleans())
def test_prompts_are_equal_and_those_of_inference(
    checkpoint: str, template: str, history: list[tuple[str, str]], question: str, chosen: str, rejected: str,
    system: str | None, is_seen: bool,
) -> None:  # fmt: skip
    make = maker_of(checkpoint, template)
    texts = [text for turn in history for text in turn]
    texts = [text.replace("<image>", "image") for text in (*texts, question)]
    texts[-1] += "<image>" * is_seen
    row = pair(*texts, chosen, rejected=rejected, system=system, images=(tiny.picture(0),) if is_seen else ())
    features = make.pair_features(row)
    prompt = prompt_ids(make, row.chosen, features["num_patches"], [])
    assert is_seen == (make.config.img_context_token_id in prompt)
    end = prompt_encoder(make.tokenizer).token_id(to_conversation(row.chosen, make.config).template.end_of_turn)
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        ids, labels = sequence(features, name)
        learned = [place for place, label in enumerate(labels) if label != -100]
        assert ids[: len(prompt)] == prompt
        assert learned == list(range(len(prompt), learned[-1] + 1))  # one run, right after the prompt
        assert [labels[place] for place in learned] == ids[len(prompt) : learned[-1] + 1]
        assert ids[learned[-1]] == end
        text = make.tokenizer.decode(ids[len(prompt) : learned[-1]], skip_special_tokens=False)
        assert "".join(text.split()) == "".join(answer.split())


@pytest.mark.parametrize("template", template_names())
def test_every_template_learns_the_last_answer_only(template: str) -> None:
    make = maker_of(CHECKPOINTS[0], template)
    row = pair("<image>\nHi", "Hello!", "Sure?", "Yes, sure.", images=(tiny.picture(0),))
    features = make.pair_features(row)
    prompt = prompt_ids(make, row.chosen, features["num_patches"], [])
    whole = make.features(row.chosen)
    ids, labels = sequence(features, "chosen")
    assert ids == whole["input_ids"].tolist()
    assert ids[: len(prompt)] == prompt
    assert labels[: len(prompt)] == [-100] * len(prompt)
    assert labels[len(prompt) :] == whole["labels"].tolist()[len(prompt) :]
    assert (whole["labels"][: len(prompt)] != -100).any()  # the earlier answer, which a conversation learns


@pytest.mark.parametrize("kind", ["qwen2", "internlm2"])
def test_one_answer_is_an_ordinary_row(kind: str) -> None:
    row = pair("<image>\nand <image>?", "A cat.", images=(tiny.picture(0), tiny.picture(1, (30, 70))))
    features = maker(kind).pair_features(row)
    for name, record in (("chosen", row.chosen), ("rejected", row.rejected)):
        expected = maker(kind).features(record)
        assert sequence(features, name) == tuple(expected[key].tolist() for key in KEYS)
        assert features["num_patches"] == expected["num_patches"]
        assert torch.equal(features["pixel_values"], expected["pixel_values"])
        assert features[f"{name}_labels"].dtype == torch.int64


def test_equal_answers_give_equal_sequences() -> None:
    features = maker().pair_features(pair("Q", "Same", rejected="Same"))
    assert sequence(features, "chosen") == sequence(features, "rejected")
    assert features["pixel_values"] is None and features["num_patches"] == []


# --------------------------------------------------------------------------------------------------------------- media


def test_media_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    tiny.picture(0, (80, 40)).save(path)
    opened, read = [], Image.open
    monkeypatch.setattr(
        Image, "open", lambda source, *rest, **more: opened.append(source) or read(source, *rest, **more)
    )
    features = maker().pair_features(pair("<image>", "A", images=(path,)))
    assert len(opened) == 1
    assert len(features["pixel_values"]) == sum(features["num_patches"])


def test_random_things_are_drawn_once() -> None:
    row = pair("<image><video>\nQ", "A", images=(tiny.picture(0),), videos=(film(30, min_frames=3, max_frames=9),))
    options = RowSettings(data_augment=True)
    takes = [Take(1, 0), Take(1, 0), Take(1, 0, 0, 1)]
    first, again, later = (maker().pair_features(row, options, take) for take in takes)
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert not torch.equal(first["pixel_values"], later["pixel_values"])
    counts = [len(first["num_patches"]) - 1]
    prompt = prompt_ids(maker(), row.chosen, first["num_patches"], counts)
    for name in ("chosen", "rejected"):
        assert sequence(first, name)[0][: len(prompt)] == prompt
        assert sequence(later, name) == sequence(first, name)


@pytest.mark.parametrize("seed", range(4))
def test_measuring_agrees_with_the_features(seed: int) -> None:
    rows = [
        pair("<image>\nHi", "Hello", "Q", "A long answer", images=(tiny.picture(seed, (30 + 40 * seed, 30)),)),
        pair("<video>\nQ", "A", rejected="Quite another one", videos=(film(12, min_frames=2, max_frames=8),)),
        pair("Q", "A"),
    ]
    for place, row in enumerate(rows):
        take = Take(seed, place)
        features, found = maker().pair_features(row, take=take), maker().measure_pair(row, take=take)
        assert found.tokens == len(features["chosen_input_ids"]) + len(features["rejected_input_ids"])
        assert found.tiles == sum(features["num_patches"])
        labels = torch.cat([features["chosen_labels"], features["rejected_labels"]])
        assert found.supervised == int((labels != -100).sum())


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_the_limit_holds_for_each_sequence(longer: str) -> None:
    texts = {"chosen": "Short", "rejected": "Short", longer: "A much longer answer than the other"}
    row = pair("Q", texts["chosen"], rejected=texts["rejected"])
    length = len(maker().pair_features(row)[f"{longer}_input_ids"])
    for call in (maker().pair_features, maker().measure_pair):
        call(row, RowSettings(length))
        with pytest.raises(SequenceTooLongError, match=rf"rows:1: with its {longer} answer: {length} tokens \(0 of"):
            call(row, RowSettings(length - 1))


# ------------------------------------------------------------------------------------------------------------ data set


def dataset(rows: Any, **options: Any) -> PreferenceDataset:
    return PreferenceDataset(rows, tiny.tokenizer(), tiny.image_processor(), tiny.config(), **options)


def with_bad_row(**options: Any) -> PreferenceDataset:
    rows = [pair("<image>Q", "A", where=f"rows:{i + 1}", images=(tiny.picture(i),)) for i in range(4)]
    gone = {"images": (Path("no/such.png"),)}
    rows[1] = PairRecord(replace(rows[1].chosen, **gone), replace(rows[1].rejected, **gone))
    return dataset(rows, name="mine", **options)


def test_rows_are_numbered_and_depend_on_their_occurrence() -> None:
    rows = [pair("<image>Q", "A", images=(tiny.picture(i),)) for i in range(3)]
    data = dataset(rows, settings=RowSettings(data_augment=True), seed=5)
    assert [features["row"] for features in data] == [0, 1, 2]
    expected = maker().pair_features(rows[2], RowSettings(data_augment=True), Take(5, 2, 1, 3))
    found = data[(2, 1, 3)]
    assert found.keys() == {*expected, "row"}
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
    assert not torch.equal(found["pixel_values"], data[2]["pixel_values"])
    assert sequence(found, "rejected") == sequence(expected, "rejected")


def test_a_bad_row_is_an_error_or_a_marker() -> None:
    with pytest.raises(RecordError, match="rows:2: cannot load image"):
        with_bad_row()[1]
    data = with_bad_row(on_error="skip")
    assert isinstance(data[1], Skipped) and isinstance(data.measure(1), Skipped)
    assert (data[1].source, data[1].where) == ("mine", "rows:2")
    loaded = list(DataLoader(data, batch_size=None, num_workers=1))
    assert [isinstance(item, Skipped) for item in loaded] == [False, True, False, False]


def test_index_counts_both_sequences_and_is_checked() -> None:
    data = with_bad_row(on_error="skip")
    index = data.build_index(progress=False)
    assert list(index.unusable) == [1]
    for row in (0, 2, 3):
        features = data[row]
        both = len(features["chosen_input_ids"]) + len(features["rejected_input_ids"])
        assert (index.tokens[row], index.tiles[row]) == (both, sum(features["num_patches"]))
    data.records[2] = pair("<image>Q", "Changed since", where="rows:3", images=(tiny.picture(2),))
    assert "where the length index says" in data[2].reason


def test_max_seq_length_leaves_out_rows_with_one_long_answer() -> None:
    rows = [pair("Q", "A"), pair("Q", "A", rejected="much longer " * 20)]
    length = len(maker().pair_features(rows[0])["chosen_input_ids"]) + 20
    index = dataset(rows, max_seq_length=length, on_error="skip").build_index(progress=False)
    assert list(index.unusable) == [1]
    assert "with its rejected answer" in index.unusable[1].reason


@pytest.fixture
def mixture(tmp_path: Path) -> Mixture:
    tiny.picture(0, (112, 28)).save(tmp_path / "a.png")
    rows = '{"image": "a.png", "question": "Q", "chosen": "A", "rejected": "B"}\n'
    sources = []
    for name, tiles in (("one", 1), ("four", 4)):
        (tmp_path / f"{name}.jsonl").write_text(rows)
        sources.append(DataSource(name, str(tmp_path / f"{name}.jsonl"), str(tmp_path), max_dynamic_patch=tiles))
    return Mixture(sources, parse=parse_pair)


def test_data_sets_of_a_mixture_keep_their_settings_and_names(mixture: Mixture) -> None:
    data = dataset(mixture)
    assert [data[row]["num_patches"] for row in (0, 1)] == [[1], [5]]
    assert data.source_sizes() == {"one": 1, "four": 1}
    assert data.epoch_rows().tolist() == [0, 1]


def test_the_index_is_cached_apart_from_that_of_conversations(mixture: Mixture, tmp_path: Path) -> None:
    data = dataset(mixture)
    supervised = ConversationDataset(mixture, tiny.tokenizer(), tiny.image_processor(), tiny.config())
    assert data.fingerprint() not in (None, supervised.fingerprint())
    index = data.build_index(tmp_path / "cache", progress=False)
    assert [path.stem for path in (tmp_path / "cache").iterdir()] == [data.fingerprint()]
    assert dataset(mixture).build_index(tmp_path / "cache", progress=False).tokens.tolist() == index.tokens.tolist()
    assert dataset([pair("Q", "A")]).fingerprint() is None


def test_workers_measure_the_same(mixture: Mixture) -> None:
    alone, helped = (dataset(mixture).build_index(workers=workers, progress=False) for workers in (0, 1))
    assert alone.lengths.tolist() == helped.lengths.tolist()
