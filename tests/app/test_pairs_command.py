"""`internvl pairs`: what is printed and written, the exit code, and one run with the tiny trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from internvl_hub.app import pairs_command
from internvl_hub.app.cli import main
from internvl_hub.app.pairs_command import pairs_main
from internvl_hub.data.mixture import Mixture, read_meta
from internvl_hub.data.pairs import parse_pair
from internvl_hub.evaluation.engines import Request
from internvl_hub.examples.internvl_tiny.export import export
from internvl_hub.tests.preference.fake_engines import FakeEngine, pictures


@pytest.fixture
def data(tmp_path: Path) -> Path:
    names = pictures(tmp_path / "images", 4)
    rows = [{"id": n, "image": n, "question": f"<image>\nColour? {n}", "answer": "a red one here"} for n in names]
    path = tmp_path / "colours.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """Stands in for the model."""
    engine = FakeEngine(_reply)
    monkeypatch.setattr(pairs_command, "_engine", lambda *_: engine)
    return engine


def _reply(request: Request, seed: int, number: int) -> str:
    return " a blue dragon" if request.prefix else ["a red one here", "blue"][number % 2]


def arguments(pipeline: str, data: Path, *more: str) -> list[str]:
    images, output = str(data.parent / "images"), str(data.parent / "pairs")
    return [pipeline, "some-model", str(data), "--images", images, "--output", output, "--batch-size", "2", *more]


def test_correctness(data: Path, engine: FakeEngine, capsys: pytest.CaptureFixture) -> None:
    assert pairs_main(arguments("correctness", data, "--style", "direct", "--samples", "4", "--task", "exact")) == 0
    printed = capsys.readouterr().out
    assert "judged as: exact 4" in printed and "0 errors, 0 warnings in 4 rows" in printed
    meta = data.parent / "pairs" / "meta.json"
    assert f"meta file  {meta}" in printed and len(Mixture(read_meta(meta), parse_pair)) == 4
    statistics = json.loads((data.parent / "pairs" / "statistics_correctness.json").read_text())
    assert statistics["colours"]["correct_share"] == 0.5 and len(engine.requests) == 4


def test_dropout(data: Path, engine: FakeEngine, capsys: pytest.CaptureFixture) -> None:
    assert pairs_main(arguments("dropout", data, "--from-answers")) == 0
    (path,) = (data.parent / "pairs").glob("*.jsonl")
    assert {json.loads(line)["rejected"] for line in path.read_text().splitlines()} == {"a red a blue dragon"}
    assert {request.text for request in engine.requests} == {f"Colour? {i}.png" for i in range(4)}


def test_defaults_are_those_of_the_original(
    data: Path, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(pairs_command, "_run", lambda options, sources, plan: asked.append(plan) or _stop())
    for pipeline in ("correctness", "dropout"):
        assert pairs_main(arguments(pipeline, data)) == 1
    first, second = asked
    assert (first.sampling.n, first.sampling.max_new_tokens, first.style) == (32, 4096, "final_answer")
    assert (second.sampling.n, second.sampling.max_new_tokens, second.style) == (1, 2048, "direct")
    for plan in asked:
        assert (plan.sampling.temperature, plan.sampling.top_k, plan.sampling.top_p) == (0.7, 50, 1.0)


def _stop() -> None:
    raise ValueError("enough")


def test_shards(data: Path, engine: FakeEngine, capsys: pytest.CaptureFixture) -> None:
    common = arguments("correctness", data, "--style", "direct", "--samples", "2")
    assert pairs_main([*common, "--shard", "1/2"]) == 0
    printed = capsys.readouterr().out
    assert "2 questions have no entry" in printed and "shard 1/2 is done" in printed
    assert pairs_main(common) == 1
    assert "go on with each: --shard I/N" in capsys.readouterr().err
    assert pairs_main([*common, "--shard", "0/2"]) == 0
    assert "meta file" in capsys.readouterr().out and len(engine.requests) == 4


def test_no_pairs_and_wrong_rows_are_errors(data: Path, engine: FakeEngine, capsys: pytest.CaptureFixture) -> None:
    engine.reply = lambda request, seed, number: "blue"
    assert pairs_main(arguments("correctness", data, "--style", "direct", "--samples", "2")) == 1
    captured = capsys.readouterr()
    assert "100.0%" in captured.out and "no pairs came out" in captured.err
    (data.parent / "images" / "2.png").unlink()
    engine.reply = _reply
    assert pairs_main(arguments("correctness", data, "--style", "direct", "--samples", "2", "--seed", "1",
                                "--output", str(data.parent / "other"))) == 1  # fmt: skip
    assert "missing-media" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["correctness", "--from-answers"], "--from-answers is not an option of correctness pairs"),
        (["dropout", "--max-pairs", "0"], "--max-pairs is not an option of dropout pairs"),
        (["dropout", "--samples", "8"], "got --samples 8"),
        (["correctness", "--samples", "0"], "n and max_new_tokens"),
        (["correctness", "--temperature", "0"], "greedy answers"), (["correctness", "--limit", "0"], "limit must be"),
        (["correctness", "--task", "nonsense"], "unknown task 'nonsense'"),
        (["correctness", "--max-pairs", "-1"], "must be 0 or more"),
        (["correctness", "--batch-size", "0"], "batch_size=0"),
    ],
    ids=["from-answers", "max-pairs", "samples", "none", "greedy", "limit", "task", "negative", "batch"],
)  # fmt: skip
def test_errors_are_one_line(
    data: Path, engine: FakeEngine, more: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    pipeline, *options = more
    assert pairs_main(arguments(pipeline, data, *options)) == 1
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert not list((data.parent).glob("pairs/*.json*"))


@pytest.mark.parametrize("text", ["4", "4/4", "a/b", "-1/2", "0/0"])
def test_shards_that_cannot_be(text: str, data: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        pairs_main(arguments("correctness", data, f"--shard={text}"))
    assert "must be I/N" in capsys.readouterr().err


def test_stored_orientation_must_be_the_same_for_all(
    data: Path, engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    meta = tmp_path / "two.json"
    entry = {"annotation": str(data), "root": str(tmp_path / "images")}
    meta.write_text(json.dumps({"a": {**entry, "exif": False}, "b": entry}))
    common = ["some-model", str(meta), "--output", str(tmp_path / "pairs"), "--style", "direct", "--samples", "2"]
    assert pairs_main(["correctness", *common]) == 1
    assert "exif" in capsys.readouterr().err
    meta.write_text(json.dumps({"a": {**entry, "exif": False}}))
    assert pairs_main(["correctness", *common]) == 0
    assert not read_meta(tmp_path / "pairs" / "meta.json")[0].exif


def test_the_server_is_an_engine(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from internvl_hub.evaluation import server_engine

    made: list[Any] = []

    class Server(FakeEngine):
        kind = "vllm"

        def __init__(self, *values: Any, **more: Any) -> None:
            super().__init__(_reply)
            made.append((values, more))

    monkeypatch.setattr(server_engine, "ServerEngine", Server)
    more = ["--server", "http://localhost:1/v1", "--concurrency", "5", "--server-kind", "vllm", "--num-frames", "4"]
    assert pairs_main(arguments("correctness", data, "--style", "direct", "--samples", "2", *more)) == 0
    ((values, options),) = made
    assert values[:2] == ("http://localhost:1/v1", "some-model")
    assert {"concurrency": 5, "kind": "vllm", "exif": True, "num_frames": 4}.items() <= options.items()


# ------------------------------------------------------------------------------------------------------ the tiny model


@pytest.mark.newest
def test_the_tiny_model_from_questions_to_pairs(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Eight pictures with all their questions, sampled hot enough for wrong answers."""
    rows = export(tmp_path / "data", 8, "val")
    common = [str(root / "checkpoints" / "internvl-tiny"), str(rows), "--images", str(tmp_path / "data" / "images")]
    common += ["--output", str(tmp_path / "pairs"), "--all-turns", "--max-new-tokens", "40", "--device", "cpu"]
    hot = ["--samples", "6", "--temperature", "1.5", "--style", "direct"]
    assert main(["pairs", "correctness", *common, *hot]) == 0
    assert main(["pairs", "dropout", *common]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" 0 errors") + printed.count("\n0 errors") == 2
    mixture = Mixture(read_meta(tmp_path / "pairs" / "meta.json"), parse_pair)
    assert {source.name for source in mixture.sources} == {"val_pairs_dropout_ntp", "val_pairs_vqa_correctness_rules"}
    gold = {row["id"]: row for row in map(json.loads, rows.read_text(encoding="utf-8").splitlines())}
    for line in (
        (tmp_path / "pairs" / "val_pairs_vqa_correctness_rules.jsonl").read_text(encoding="utf-8").splitlines()
    ):
        row = json.loads(line)
        talk = gold[row["id"].partition("#")[0]]["conversations"]
        turn = int(row["id"].partition("#")[2].partition("/")[0])
        assert row["answer_gt"] == talk[2 * turn - 1]["value"]
        assert row["question"].removeprefix("<image>\n") == talk[2 * turn - 2]["value"].removeprefix("<image>\n")
        assert row["chosen"] != row["rejected"] and row["chosen_meta"]["score"] > 0.9 >= row["rejected_meta"]["score"]
    monkeypatch.setattr(pairs_command, "make_engine", lambda *_: pytest.fail("the answers are stored"))
    before = (tmp_path / "pairs" / "meta.json").read_bytes()
    assert main(["pairs", "correctness", *common, *hot]) == 0
    assert (tmp_path / "pairs" / "meta.json").read_bytes() == before


def test_a_checkpoint_that_was_trained_on_is_another_model(
    data: Path, engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"before")
    common = [
        str(data),
        "--output",
        str(tmp_path / "pairs"),
        "--images",
        str(tmp_path / "images"),
        "--style",
        "direct",
    ]
    common = ["correctness", str(tmp_path / "model"), *common, "--samples", "2"]
    assert pairs_main(common) == 0
    (tmp_path / "model" / "model.safetensors").write_bytes(b"after")
    assert pairs_main(common) == 1
    assert "weights: " in capsys.readouterr().err


def test_markup_stays_in_the_answers(root: Path) -> None:
    folder = str(root / "checkpoints" / "internvl-tiny")
    parsed = pairs_command._parser().parse_args(["dropout", folder, "x.jsonl", "--output", "y", "--device", "cpu"])
    parsed.batch_size = 2
    engine = pairs_command._engine(parsed, exif=False)
    assert (engine.keep_markup, engine.exif, engine.num_frames, engine.batch_size) == (True, False, 16, 2)
