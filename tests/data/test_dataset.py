"""Records to model inputs: ids equal inference's, labels are the answers, nothing is cut, skipping is counted."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from internvl_hub.data.dataset import (
    ConversationDataset,
    SequenceTooLongError,
    make_features,
    to_conversation,
)
from internvl_hub.data.records import Message, Record, RecordError
from internvl_hub.data.skipped import Skipped
from internvl_hub.prompting_internvl import prompt_encoder
from internvl_hub.tests.training import tiny_models as tiny


def features(record: Record, kind: str = "qwen2", **options) -> dict:
    return make_features(record, tiny.tokenizer(kind), tiny.image_processor(), tiny.config(kind), **options)


@pytest.mark.parametrize("kind", ["qwen2", "internlm2"])
def test_labels_are_the_answers_and_their_stop_token(kind: str) -> None:
    record = tiny.records(1)[0]
    record = replace(record, messages=(*record.messages, Message("human", "Sure?"), Message("gpt", "Yes.")))
    row = features(record, kind)
    kept = row["labels"] != -100
    assert torch.equal(row["labels"][kept], row["input_ids"][kept])
    assert tiny.tokenizer(kind).decode(row["labels"][kept]) == "A cat.<|im_end|>Yes.<|im_end|>"


@pytest.mark.parametrize("kind", ["qwen2", "internlm2"])
def test_ids_begin_with_the_inference_prompt(kind: str) -> None:
    record, config = tiny.records(1)[0], tiny.config(kind)
    conversation = to_conversation(record, config)
    conversation.messages[-1][1] = None
    prompt = prompt_encoder(tiny.tokenizer(kind)).encode(conversation.segments(), [3 * config.tokens_per_tile(1)[0]])
    assert features(record, kind)["input_ids"].tolist()[: len(prompt.input_ids)] == prompt.input_ids


def test_visual_tokens_match_the_tiles() -> None:
    config = tiny.config()
    for record in tiny.records():
        row = features(record)
        tiles = 0 if row["pixel_values"] is None else len(row["pixel_values"])
        assert sum(row["num_patches"]) == tiles
        assert len(row["num_patches"]) == len(record.images)
        slots = int((row["input_ids"] == config.img_context_token_id).sum())
        assert slots == sum(config.tokens_per_tile(tiles))


def test_several_images_share_the_tile_budget() -> None:
    message = (Message("human", "<image><image>"), Message("gpt", "A"))
    wide = (112, 28)
    one = features(Record((Message("human", "<image>"), message[1]), (tiny.picture(0, wide),)))
    two = features(Record(message, (tiny.picture(0, wide), tiny.picture(1, wide))))
    assert one["num_patches"] == [5]
    assert two["num_patches"] == [3, 3]


@pytest.mark.parametrize("kind", ["qwen2", "internlm2"])
def test_system_turn_replaces_the_default(kind: str) -> None:
    record = Record((Message("system", "Be brief."), Message("human", "Q"), Message("gpt", "A")))
    text = tiny.tokenizer(kind).decode(features(record, kind)["input_ids"])
    assert "system\nBe brief.<|im_end|>" in text
    assert "InternVL" not in text


def test_placeholders_outside_human_turns_are_text() -> None:
    row = features(Record((Message("human", "Q"), Message("gpt", "the <image> tag"))))
    assert row["pixel_values"] is None
    assert "the <image> tag" in tiny.tokenizer().decode(row["input_ids"])


def test_long_rows_are_refused_not_cut() -> None:
    record = tiny.records(1)[0]
    length = len(features(record)["input_ids"])
    assert len(features(record, max_seq_length=length)["input_ids"]) == length
    with pytest.raises(SequenceTooLongError, match=rf"rows:1: {length} tokens \(12 of them visual\)"):
        features(record, max_seq_length=length - 1)


def with_bad_row(**options) -> ConversationDataset:
    rows = tiny.records(4)
    rows[1] = replace(rows[0], images=(Path("no/such.png"),), where="rows:2")
    return ConversationDataset(rows, tiny.tokenizer(), tiny.image_processor(), tiny.config(), name="mine", **options)


def test_unreadable_image_names_the_row() -> None:
    with pytest.raises(RecordError, match="rows:2: cannot load image"):
        with_bad_row()[1]


def test_a_bad_row_is_marked_and_never_replaced() -> None:
    dataset = with_bad_row(on_error="skip")
    marker = dataset[1]
    assert isinstance(marker, Skipped)
    assert (marker.source, marker.where) == ("mine", "rows:2")
    assert "cannot load image" in marker.reason
    assert isinstance(dataset.measure(1), Skipped)
    assert not isinstance(dataset[2], Skipped)


def test_measuring_agrees_with_the_features() -> None:
    dataset = tiny.dataset(count=8)
    for row in range(8):
        features, found = dataset[row], dataset.measure(row)
        assert found.tokens == len(features["input_ids"])
        assert found.tiles == sum(features["num_patches"])
        assert found.supervised == int((features["labels"] != -100).sum())


def test_errors_of_workers_keep_their_type() -> None:
    loader = DataLoader(with_bad_row(), batch_size=None, num_workers=1)
    with pytest.raises(RecordError, match="rows:2: cannot load image"):
        list(loader)


def test_iteration_ends() -> None:
    assert len(list(tiny.dataset(count=3))) == 3
