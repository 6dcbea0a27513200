"""Correctness pairs from files of questions to files of pairs, with an engine that needs no model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from internvl_hub.data.mixture import Mixture, read_meta
from internvl_hub.data.pairs import PairRecord, parse_pair
from internvl_hub.data.records import RecordError
from internvl_hub.data.sources import DataSourceError
from internvl_hub.data.validate import validate
from internvl_hub.evaluation.engines import Answer, Failure, Request
from internvl_hub.evaluation.prompts import THINKING_SYSTEM_PROMPT
from internvl_hub.preference.correctness import Caps
from internvl_hub.preference.correctness_pipeline import make_correctness_pairs
from internvl_hub.preference.question_sources import read_sources
from internvl_hub.preference.sampling import LazyEngine
from internvl_hub.tests.preference.fake_engines import FakeEngine, Stop, pictures, plan
from internvl_hub.training.arguments import DataArguments

WORDS = ("red", "blue", "green", "dark red")


def reply(request: Request, seed: int, number: int) -> str:
    """Words that depend on the question, the seed of its batch and the sample."""
    return WORDS[(len(request.text) * 7 + seed + number * 3) % len(WORDS)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Nine questions about pictures; two have no gold answer."""
    names = pictures(tmp_path / "images", 9)
    rows = [
        {"id": f"q{i}", "image": name, "question": f"<image>\nColour {'?' * (i + 1)}", "answer": "red"}
        for i, name in enumerate(names)
    ]
    del rows[3]["answer"]
    rows[5]["answer"] = " "
    return write_rows(tmp_path / "colours.jsonl", rows)


def run(data: Path, output: Path, engine: Any, caps: Caps = Caps(), n: int = 8, **options: Any) -> Any:  # noqa: B008
    sources = read_sources([data], str(data.parent / "images"))
    return make_correctness_pairs(
        sources, plan(output, engine, n, style=options.pop("style", "direct"), **options), caps=caps
    )


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.glob("*_rules.jsonl"))}


# --------------------------------------------------------------------------------------------------------------- files


def test_the_files_are_training_data(data: Path, tmp_path: Path) -> None:
    result = run(data, tmp_path / "pairs", FakeEngine(reply))
    (name,) = result.files
    assert name == "colours_pairs_vqa_correctness_rules" and result.meta == tmp_path / "pairs" / "meta.json"
    rows = read_rows(result.files[name])
    assert rows[0]["image"] == "0.png" and rows[0]["question"] == "<image>\nColour ?" and rows[0]["answer_gt"] == "red"
    assert {row["image"] for row in rows} == {f"{i}.png" for i in (0, 1, 2, 4, 6, 7, 8)}
    assert rows[0]["chosen_meta"]["score"] == 1 and rows[0]["rejected_meta"]["score"] < 0.9
    assert len({row["id"] for row in rows}) == len(rows)
    mixture = Mixture(read_meta(result.meta), parse_pair)
    assert len(mixture) == len(rows) == read_meta(result.meta)[0].length
    assert isinstance(mixture[0], PairRecord) and mixture[0].chosen.images == (tmp_path / "images" / "0.png",)
    report = validate(DataArguments(meta_path=str(result.meta)))
    assert report.is_ok and not report.warnings
    assert not [path for path in (tmp_path / "pairs").iterdir() if path.name.startswith(".")]


def test_the_system_text_of_the_prompt_is_in_the_rows(data: Path, tmp_path: Path) -> None:
    def think(request: Request, seed: int, number: int) -> str:
        return f"<think>Let me see.</think>\n{reply(request, seed, number)}"

    engine = FakeEngine(think)
    result = run(data, tmp_path / "pairs", engine, style="think")
    rows = read_rows(result.files["colours_pairs_vqa_correctness_rules"])
    asked = {(request.text, request.system) for request in engine.requests}
    for row in rows:
        assert (row["question"], row["system"]) in asked and row["system"] == THINKING_SYSTEM_PROMPT
        pair = parse_pair(row)
        assert [message.speaker for message in pair.chosen.messages] == ["system", "human", "gpt"]
        assert pair.chosen.messages[1].text == row["question"] and pair.rejected.messages[-1].text == row["rejected"]
    own = write_rows(tmp_path / "own.jsonl", [{"system": "Speak plainly.", "question": "Colour?", "answer": "red"}])
    engine = FakeEngine(think)
    run(own, tmp_path / "own", engine, style="think")
    assert engine.requests[0].system == f"Speak plainly.\n{THINKING_SYSTEM_PROMPT}"


@pytest.mark.parametrize(
    "row",
    [
        {"image": ["a.png", "sub/b.png"], "question": "Image-1: <image>\nImage-2: <image>\nSame?"},
        {"image": "/elsewhere/a.png", "question": "<image>\nQ"}, {"image": "../a.png", "question": "<image>\nQ"},
        {"image": "https://example.org/a.png", "question": "<image>\nQ"}, {"question": "1 + 1?"},
        {"video": "v.mp4", "question": "<video>\nQ"}, {"video": "v.mp4", "clip": [1, None], "question": "<video>\nQ"},
        {"video": [{"path": "v.mp4", "clip": [1, 2.5], "num_frames": 4}, "w.mp4"], "question": "<video>\n<video>\nQ"},
        {"video": {"path": ["f/1.png", "f/2.png"], "fps": 2}, "question": "<video>\nQ"},
    ],
    ids=["several", "absolute", "parent", "url", "text", "video", "open-clip", "videos", "frames"],
)  # fmt: skip
@pytest.mark.parametrize("root", ["", "images", "/data/images"], ids=["none", "relative", "absolute"])
def test_media_are_those_of_the_source(row: dict[str, Any], root: str, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{**row, "answer": "red"}])
    sources = read_sources([data], root or None)
    result = make_correctness_pairs(sources, plan(tmp_path / "pairs", FakeEngine(reply), style="direct"))
    (path,) = result.files.values()
    pair, question = parse_pair(read_rows(path)[0], root=root), sources[0].questions[0]
    assert (pair.chosen.images, pair.chosen.videos) == (question.images, question.videos)
    written = read_rows(path)[0]
    assert all(written[key] == row[key] for key in ("image", "question") if key in row)


def test_format_failures_have_their_own_file_and_cap(data: Path, tmp_path: Path) -> None:
    def answer(request: Request, seed: int, number: int) -> Any:
        full = f"One.\nTwo.\n\nFinal answer: {'red' if number % 2 else 'blue'} {'' if number < 4 else ' '}".rstrip(" ")
        return [full, full, "no trigger", Answer("Final", complete=False), "Final answer: red", f"\n{full}"][
            number % 6
        ]

    result = run(data, tmp_path / "pairs", FakeEngine(answer), Caps(15, 2), n=6, style="final_answer")
    statistics = result.statistics["colours"]
    assert set(statistics.pairs) == {"pairs_vqa_correctness_rules", "pairs_vqa_format_rules"}
    assert statistics.pairs["pairs_vqa_format_rules"] == 2 * statistics.answered
    rows = read_rows(result.files["colours_pairs_vqa_format_rules"])
    assert {row["rejected_meta"]["problem"] for row in rows} <= {"no_trigger", "cut at the token limit", "few_lines"}
    assert statistics.format_failures == {"no_trigger": 7, "cut at the token limit": 7, "few_lines": 7}


def test_nothing_is_left_of_pairs_that_are_no_longer_there(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "pairs", FakeEngine(reply))
    result = run(data, tmp_path / "pairs", FakeEngine(reply), Caps(0))
    assert result.meta is None and not result.files and not contents(tmp_path / "pairs")


# --------------------------------------------------------------------------------------------- stopping, shards, order


def test_stopping_changes_nothing(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "whole", FakeEngine(reply))
    with pytest.raises(Stop):
        run(data, tmp_path / "stopped", FakeEngine(reply, stop_after=2))
    assert not contents(tmp_path / "stopped")
    (store,) = (tmp_path / "stopped").rglob("answers-*.jsonl")
    store.write_bytes(store.read_bytes()[:-9])  # killed while it wrote
    engine = FakeEngine(reply)
    run(data, tmp_path / "stopped", engine)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    assert len(engine.batches) == 3  # the cut one and the last two of four


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=["forwards", "mixed"])
def test_shards_give_what_one_process_gives(data: Path, tmp_path: Path, order: tuple[int, ...]) -> None:
    run(data, tmp_path / "whole", FakeEngine(reply))
    missing = [run(data, tmp_path / "shards", FakeEngine(reply), shard=(shard, 3)).missing for shard in order]
    assert missing[0] > missing[1] > missing[2] == 0
    assert contents(tmp_path / "shards") == contents(tmp_path / "whole") != {}
    again = run(data, tmp_path / "shards", LazyEngine("fake", pytest.fail), Caps(1))  # without naming a shard
    assert again.files and again.statistics["colours"].pairs.total() <= 7


def test_unfinished_shards_are_only_read_by_a_run_that_names_none(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "shards", FakeEngine(reply), shard=(0, 2))
    assert run(data, tmp_path / "shards", LazyEngine("fake", pytest.fail)).missing == 3
    assert not contents(tmp_path / "shards")


def test_the_order_of_the_questions_does_not_matter(data: Path, tmp_path: Path) -> None:
    def steady(request: Request, seed: int, number: int) -> str:
        return reply(request, 0, number)

    run(data, tmp_path / "one", FakeEngine(steady), Caps(1))
    write_rows(data, read_rows(data)[::-1])
    run(data, tmp_path / "other", FakeEngine(steady), Caps(1))
    (one,), (other,) = (contents(tmp_path / name).values() for name in ("one", "other"))
    assert sorted(one.splitlines()) == sorted(other.splitlines()) and one != other


def test_answers_are_paired_again_without_a_model(data: Path, tmp_path: Path) -> None:
    first = run(data, tmp_path / "pairs", FakeEngine(reply))
    before = contents(tmp_path / "pairs")
    second = run(data, tmp_path / "pairs", LazyEngine("fake", pytest.fail), Caps(1))
    assert second.statistics["colours"].pairs.total() == 7 < first.statistics["colours"].pairs.total()
    run(data, tmp_path / "pairs", LazyEngine("fake", pytest.fail))
    assert contents(tmp_path / "pairs") == before


def test_workers_judge_as_one_process_does(data: Path, tmp_path: Path) -> None:
    sources = read_sources([data], str(tmp_path / "images"))
    for workers in (0, 2):
        make_correctness_pairs(
            sources, plan(tmp_path / str(workers), FakeEngine(reply), style="direct"), workers=workers
        )
    assert contents(tmp_path / "0") == contents(tmp_path / "2") != {}


@pytest.mark.parametrize(
    ("change", "message"),
    [({"seed": 1}, "sampling.seed: 0 there, 1 now"), ({"n": 4}, "sampling.n: 8 there, 4 now"),
     ({"style": "boxed"}, "style: 'direct' there, 'boxed' now"), ({"max_tiles": 2}, "max_tiles: None there, 2 now")],
    ids=["seed", "n", "style", "tiles"],
)  # fmt: skip
def test_other_settings_are_not_mixed(data: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    run(data, tmp_path / "pairs", FakeEngine(reply))
    with pytest.raises(ValueError, match=message):
        run(data, tmp_path / "pairs", FakeEngine(reply), **change)


def test_failures_are_counted_and_asked_again_on_demand(data: Path, tmp_path: Path) -> None:
    def flaky(request: Request, seed: int, number: int) -> Any:
        return Failure("no such\npicture") if len(request.text) % 2 else reply(request, seed, number)

    result = run(data, tmp_path / "pairs", FakeEngine(flaky))
    statistics = result.statistics["colours"]
    assert statistics.failed and statistics.failed + statistics.answered == 7
    assert statistics.failures == {"no such picture": statistics.failed}
    assert run(data, tmp_path / "pairs", LazyEngine("fake", pytest.fail)).statistics["colours"].failed
    run(data, tmp_path / "pairs", FakeEngine(reply), retry_failures=True)
    run(data, tmp_path / "whole", FakeEngine(reply))
    assert contents(tmp_path / "pairs") == contents(tmp_path / "whole")


def test_hostile_answers_end_in_valid_rows(data: Path, tmp_path: Path) -> None:
    texts = [
        "red", "", "\x00", "\ud800", "x" * 300_000, "Final answer: red" * 400, "<|im_end|>\n<|im_start|>user",
        "<image>",
        "<script>alert(1)</script>", "red\u2028", "<box>[[1, 2", "}{" * 2000, "\u202e", "```\nred\n```",
        "猫" * 3000, "\r\n",
    ]  # fmt: skip
    engine = FakeEngine(lambda request, seed, number: texts[number])
    result = run(data, tmp_path / "pairs", engine, n=len(texts))
    report = validate(DataArguments(meta_path=str(result.meta)))
    assert report.is_ok and result.statistics["colours"].left_out["not valid Unicode"] == 7
    (path,) = result.files.values()
    assert {row["rejected"] for row in read_rows(path)} >= {"\x00", "<image>", "<box>[[1, 2", "\u202e"}


# ------------------------------------------------------------------------------------------------------------- sources


def test_sources_of_a_meta_file(data: Path, tmp_path: Path) -> None:
    other = write_rows(
        tmp_path / "chart.jsonl", [{"id": 1, "image": "0.png", "question": "<image>\nN?", "answer": "10"}]
    )
    entries = {
        "my/colours": {"root": "images", "annotation": str(data), "max_dynamic_patch": 4, "data_augment": True},
        "ChartQA train": {"root": str(tmp_path / "images"), "annotation": str(other), "repeat_time": 0.5},
        "off": {"annotation": "nowhere.jsonl", "repeat_time": 0},
    }
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps(entries))
    engine = FakeEngine(lambda request, seed, number: ["10.4", "12", "red"][number % 3])
    result = make_correctness_pairs(read_sources([meta]), plan(tmp_path / "pairs", engine, style="direct"))
    assert result.statistics["ChartQA train"].tasks == {"relaxed": 1}  # 10.4 is within five per cent of 10
    assert set(result.files) == {
        "my_colours_pairs_vqa_correctness_rules", "ChartQA_train_pairs_vqa_correctness_rules",
    }  # fmt: skip
    by_name = {source.name: source for source in read_meta(result.meta)}
    colours, chart = (by_name[name] for name in sorted(by_name, reverse=True))
    assert (colours.max_dynamic_patch, colours.data_augment, colours.root) == (4, True, str(tmp_path / "images"))
    assert (chart.max_dynamic_patch, chart.repeat_time) == (None, 1)
    assert {request.max_tiles for request in engine.requests} == {4, None}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (lambda folder: [], "there is no data"), (lambda folder: [folder / "absent.jsonl"], "no annotation file"),
        (lambda folder: [folder / "absent.json"], "cannot read it"),
        (lambda folder: [folder / "broken.json"], "not valid json"),
        (lambda folder: [folder / "colours.jsonl", folder / "meta.json"], "rename it"),
    ],
    ids=["none", "absent", "absent-json", "broken", "names"],
)  # fmt: skip
def test_sources_that_cannot_be(data: Path, tmp_path: Path, files: Callable[[Path], list[Path]], message: str) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "meta.json").write_text(json.dumps({"Colours": {"annotation": str(data)}}))
    with pytest.raises(DataSourceError, match=message):
        read_sources(files(tmp_path))


def test_limit_and_all_turns(tmp_path: Path) -> None:
    turns = [{"from": ("human", "gpt")[i % 2], "value": f"turn {i}"} for i in range(4)]
    data = write_rows(tmp_path / "talk.jsonl", [{"conversations": turns}, {"conversations": turns}])
    assert [len(read_sources([data], all_turns=every)[0].questions) for every in (False, True)] == [2, 4]
    assert len(read_sources([data], all_turns=True, limit=3)[0].questions) == 3
    with pytest.raises(ValueError, match="limit must be at least 1"):
        read_sources([data], limit=0)
    write_rows(data, [{"question": 5}])
    with pytest.raises(RecordError, match="talk.jsonl:1"):
        read_sources([data])


def test_tasks(data: Path, tmp_path: Path) -> None:
    rows = read_rows(data)
    for row, task in zip(rows, ("exact", "DocVQA", None), strict=False):
        row["task"] = task
    write_rows(data, rows)
    sources = read_sources([data], str(tmp_path / "images"))

    def tasks(name: str | None) -> dict[str, int]:
        result = make_correctness_pairs(sources, plan(tmp_path / "pairs", FakeEngine(reply), style="direct"), name)
        return dict(result.statistics["colours"].tasks)

    assert tasks(None) == {"exact": 1, "anls": 1, "auto": 5}
    assert tasks("chartqa") == {"relaxed": 7} and tasks("auto") == {"auto": 7}
    with pytest.raises(ValueError, match="unknown task 'nonsense'; known are exact"):
        tasks("nonsense")
    write_rows(data, [{**rows[0], "task": "nonsense"}])
    sources = read_sources([data], str(tmp_path / "images"))
    with pytest.raises(ValueError, match="colours.jsonl:1: unknown task 'nonsense'; --task overrides it"):
        tasks(None)
