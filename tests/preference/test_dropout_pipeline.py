"""DropoutNTP pairs from files of questions to files of pairs, with an engine that needs no model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from internvl_hub.data.mixture import Mixture, read_meta
from internvl_hub.data.pairs import parse_pair
from internvl_hub.data.validate import validate
from internvl_hub.evaluation.engines import Answer, Failure, Request
from internvl_hub.preference.correctness_pipeline import make_correctness_pairs
from internvl_hub.preference.dropout_pipeline import make_dropout_pairs
from internvl_hub.preference.question_sources import read_sources
from internvl_hub.preference.sampling import LazyEngine
from internvl_hub.tests.preference.fake_engines import FakeEngine, Stop, pictures, plan
from internvl_hub.training.arguments import DataArguments

NAME = "scenes_pairs_dropout_ntp"


def reply(request: Request, seed: int, number: int) -> str:
    """A description with the picture; without it, one that was made up, with its own space in front."""
    if request.prefix:
        return f" a dragon of {seed % 7} heads."
    return f"I see a cat on mat {len(request.text)} and {seed % 5} dogs."


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Seven questions about pictures and one about nothing; every second has an answer."""
    rows: list[dict[str, Any]] = [
        {"id": f"s{i}", "image": name, "question": f"<image>\nDescribe it{'!' * i}"}
        for i, name in enumerate(pictures(tmp_path / "images", 7))
    ]
    for row in rows[::2]:
        row["answer"] = "一只黑色的猫在红色的垫子上睡觉。"
    path = tmp_path / "scenes.jsonl"
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"question": "1 + 1?", "answer": "The sum is 2"}])
    )
    return path


def run(data: Path, output: Path, engine: Any, from_answers: bool = False, keep_cut: bool = False, **more: Any) -> Any:
    sources = read_sources([data], str(data.parent / "images"))
    return make_dropout_pairs(sources, plan(output, engine, 1, **{"style": "direct", **more}), from_answers, keep_cut)


def rows_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / f"{NAME}.jsonl").read_bytes().splitlines()]


def test_pairs_of_sampled_answers(data: Path, tmp_path: Path) -> None:
    engine = FakeEngine(reply)
    result = run(data, tmp_path / "pairs", engine)
    rows = rows_of(tmp_path / "pairs")
    assert [row["image"] for row in rows] == [f"{i}.png" for i in range(7)]
    for row in rows:
        prefix = row["rejected_meta"]["prefix"]
        assert (
            row["chosen"].startswith("I see a cat on mat") and len(prefix.split()) == len(row["chosen"].split()) // 2
        )
        assert row["rejected"].startswith(f"{prefix} a dragon of") and row["question"].startswith("<image>\nDescribe")
        parse_pair(row)
    blind = [request for request in engine.requests if request.prefix]
    assert len(blind) == 7 and not any(request.images or "<image>" in request.text for request in blind)
    assert {request.prefix for request in blind} == {row["rejected_meta"]["prefix"] for row in rows}
    assert result.statistics["scenes"].skipped.total() == 1 and result.statistics["scenes"].answered == 7
    assert len(Mixture(read_meta(result.meta), parse_pair)) == 7
    assert validate(DataArguments(meta_path=str(result.meta))).is_ok


def test_pairs_of_the_answers_of_the_data(data: Path, tmp_path: Path) -> None:
    engine = FakeEngine(lambda request, seed, number: "狗在跑。")
    result = run(data, tmp_path / "pairs", engine, from_answers=True)
    rows = rows_of(tmp_path / "pairs")
    assert [row["image"] for row in rows] == ["0.png", "2.png", "4.png", "6.png"]
    assert {row["chosen"] for row in rows} == {"一只黑色的猫在红色的垫子上睡觉。"}
    assert {row["rejected"] for row in rows} == {"一只黑色的猫在红狗在跑。"}
    assert all(request.prefix == "一只黑色的猫在红" for request in engine.requests)
    assert result.statistics["scenes"].skipped.total() == 4
    changed = data.read_text(encoding="utf-8").replace(json.dumps("猫")[1:-1], json.dumps("狗")[1:-1])
    data.write_text(changed, encoding="utf-8")
    with pytest.raises(ValueError, match="answers_digest"):
        run(data, tmp_path / "pairs", engine, from_answers=True)


def test_what_makes_no_pair_is_counted(data: Path, tmp_path: Path) -> None:
    def answer(request: Request, seed: int, number: int) -> Any:
        which = request.text.count("!")
        if not request.prefix:
            return (
                ["Yes", "", Answer("cut off here", complete=False), Failure("no picture")][which]
                if which < 4
                else "a b"
            )
        return {4: "", 5: Answer(" c", complete=False), 6: " b"}[which]

    result = run(data, tmp_path / "pairs", FakeEngine(answer))
    statistics = result.statistics["scenes"]
    assert (statistics.answered, statistics.failed, statistics.pairs.total()) == (6, 1, 0) and result.meta is None
    assert statistics.left_out == {
        "chosen: too short for two halves": 1, "chosen: empty": 1, "chosen: cut at the token limit": 1,
        "continuation: empty": 1, "continuation: cut at the token limit": 1, "rejected: the same as the chosen": 1,
    }  # fmt: skip
    run(data, tmp_path / "pairs", LazyEngine("fake", pytest.fail), keep_cut=True)
    assert [row["rejected"] for row in rows_of(tmp_path / "pairs")] == ["a c"]
    engine = FakeEngine(lambda request, seed, number: " x y z")
    run(data, tmp_path / "pairs", engine, keep_cut=True, retry_failures=True)
    assert [row["rejected"] for row in rows_of(tmp_path / "pairs")] == [" x x y z", "a c"]
    assert len([request for request in engine.requests if request.prefix]) == 1  # nothing else was asked again


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_stopping_changes_nothing(data: Path, tmp_path: Path, stop: int) -> None:
    run(data, tmp_path / "whole", FakeEngine(reply))
    with pytest.raises(Stop):
        run(data, tmp_path / "stopped", FakeEngine(reply, stop_after=stop))
    run(data, tmp_path / "stopped", FakeEngine(reply))
    assert rows_of(tmp_path / "stopped") == rows_of(tmp_path / "whole")


def test_shards_give_what_one_process_gives(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "whole", FakeEngine(reply))
    results = [run(data, tmp_path / "shards", FakeEngine(reply), shard=(shard, 3)) for shard in (2, 1, 0)]
    assert [bool(result.missing) for result in results] == [True, True, False]
    assert rows_of(tmp_path / "shards") == rows_of(tmp_path / "whole")
    assert run(data, tmp_path / "shards", LazyEngine("fake", pytest.fail)).files


def test_both_kinds_of_pairs_share_a_folder(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "pairs", FakeEngine(reply))
    sources = read_sources([data], str(tmp_path / "images"))
    engine = FakeEngine(lambda request, seed, number: ["一只黑色的猫在红色的垫子上睡觉。", "狗", "2"][number % 3])
    result = make_correctness_pairs(sources, plan(tmp_path / "pairs", engine, style="direct"), "exact")
    names = [source.name for source in read_meta(result.meta)]
    assert names == [NAME, "scenes_pairs_vqa_correctness_rules"]
    assert {path.name for path in (tmp_path / "pairs").glob("statistics_*")} == {
        "statistics_dropout_ntp.json", "statistics_correctness.json",
    }  # fmt: skip
    (tmp_path / "pairs" / f"{NAME}.jsonl").unlink()
    result = make_correctness_pairs(sources, plan(tmp_path / "pairs", engine, style="direct"), "exact")
    assert [source.name for source in read_meta(result.meta)] == ["scenes_pairs_vqa_correctness_rules"]
    (tmp_path / "pairs" / "meta.json").write_text("[]")
    with pytest.raises(ValueError, match="is no meta file of pairs"):
        make_correctness_pairs(sources, plan(tmp_path / "pairs", engine, style="direct"), "exact")


def test_one_answer_is_sampled(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one answer is sampled for each question, got n=8"):
        make_dropout_pairs(read_sources([data]), plan(tmp_path, FakeEngine(reply)))
