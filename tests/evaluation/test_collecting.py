"""Collections: whatever interrupts or splits them, the answers are those of one that ran through."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from internvl_hub.evaluation.answer_store import AnswerStore, missing_shards, read_entries
from internvl_hub.evaluation.collecting import (
    batch_seed,
    collect,
    collection_settings,
    read_answers,
    requests_digest,
)
from internvl_hub.evaluation.engines import Answer, Failure, Request, Sampling

SAMPLING = Sampling(n=3, temperature=1.0, seed=5)


class Dice:
    """An engine whose answers depend on the seed and on the place in the batch; some requests fail."""

    name = "dice"

    def __init__(self, stop_after: int | None = None, broken: Sequence[str] = ("q3",)) -> None:
        self.stop_after, self.broken, self.batches = stop_after, broken, []

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Answer] | Failure]:
        if self.stop_after is not None and len(self.batches) >= self.stop_after:
            raise KeyboardInterrupt
        self.batches.append([request.text for request in requests])
        draw = random.Random(sampling.seed)
        results: list[list[Answer] | Failure] = []
        for request in requests:
            answers = [Answer(f"{request.text}: {draw.random()}", draw.random() < 0.5) for _ in range(sampling.n)]
            results.append(Failure("cannot read") if request.text in self.broken else answers)
        return results


REQUESTS = [(f"key {i}", Request(f"q{i}")) for i in range(11)]


def run(folder: Path, engine: Dice | None = None, shard: int = 0, shards: int = 1, batch_size: int = 4) -> bytes:
    engine = engine or Dice()
    store = AnswerStore(folder, collection_settings(REQUESTS, engine, SAMPLING, batch_size), shard, shards)
    collect(REQUESTS, engine, SAMPLING, store, batch_size, progress=False)
    return store.path.read_bytes()


def test_every_request_has_its_entry(tmp_path: Path) -> None:
    run(tmp_path)
    results = read_answers(read_entries(tmp_path))
    assert list(results) == [key for key, _ in REQUESTS]
    assert results["key 3"] == Failure("cannot read")
    draw = random.Random(batch_seed(5, "key 8"))  # the last batch is of 3
    for i in (8, 9, 10):
        expected = [Answer(f"q{i}: {draw.random()}", draw.random() < 0.5) for _ in range(3)]
        assert results[f"key {i}"] == expected


@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_an_interrupted_collection_ends_the_same(tmp_path: Path, stop_after: int) -> None:
    expected = run(tmp_path / "whole")
    engine = Dice(stop_after)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", engine)
    resumed = Dice()
    assert run(tmp_path / "cut", resumed) == expected
    assert len(engine.batches) + len(resumed.batches) == 3  # nothing was asked twice
    assert run(tmp_path / "cut", Dice(stop_after=0)) == expected  # nothing is left to ask


def test_a_file_cut_anywhere_ends_the_same(tmp_path: Path) -> None:
    expected = run(tmp_path)
    (path,) = tmp_path.iterdir()
    for length in range(0, len(expected), 41):
        path.write_bytes(expected[:length])
        assert run(tmp_path) == expected


@pytest.mark.parametrize("shards", [2, 3, 5])
def test_shards_are_the_whole(tmp_path: Path, shards: int) -> None:
    run(tmp_path / "one")
    for shard in reversed(range(shards)):
        run(tmp_path / "many", shard=shard, shards=shards)
    assert not missing_shards(tmp_path / "many")
    whole = {entry["key"]: entry for entry in read_entries(tmp_path / "one")}
    assert {entry["key"]: entry for entry in read_entries(tmp_path / "many")} == whole


def test_failures_are_asked_again_only_where_wanted(tmp_path: Path) -> None:
    run(tmp_path)
    healed = Dice(broken=())
    store = AnswerStore(tmp_path, collection_settings(REQUESTS, healed, SAMPLING, 4))
    collect(REQUESTS, healed, SAMPLING, store, 4, progress=False)
    assert healed.batches == []
    collect(REQUESTS, healed, SAMPLING, store, 4, progress=False, retry_failures=True)
    assert healed.batches == [["q0", "q1", "q2", "q3"]]
    fresh = AnswerStore(tmp_path / "fresh", store.settings)
    collect(REQUESTS, Dice(broken=()), SAMPLING, fresh, 4, progress=False)
    assert {e["key"]: e for e in store.entries()} == {e["key"]: e for e in fresh.entries()}


def test_the_bar_counts_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Dice()
    collect(REQUESTS, engine, SAMPLING, AnswerStore(tmp_path, {}), 4)
    text = capsys.readouterr().err
    assert "11/11" in text and "failed=1" in text


def test_other_settings_are_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ValueError, match="batch_size: 4 there, 5 now"):
        run(tmp_path, batch_size=5)
    other = [*REQUESTS[:-1], ("key 10", Request("another"))]
    with pytest.raises(ValueError, match="requests_digest"):
        AnswerStore(tmp_path, collection_settings(other, Dice(), SAMPLING, 4))


def test_the_digest_knows_what_matters(tmp_path: Path) -> None:
    base = Request("q", (Path("a/b.png"),))
    same = Request("q", (Path("elsewhere/b.png"),))
    assert requests_digest([("k", base)]) == requests_digest([("k", same)])
    others = [
        Request("q", (Path("a/c.png"),)), Request("r", base.images), Request("q", base.images, system=""),
        Request("q", base.images, prefix="p"), Request("q", base.images, max_tiles=2), Request("q"),
    ]  # fmt: skip
    digests = {requests_digest([("k", request)]) for request in (base, *others)} | {requests_digest([("l", base)])}
    assert len(digests) == len(others) + 2


def test_bad_arguments(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path, {})
    with pytest.raises(ValueError, match="batch_size=0"):
        collect(REQUESTS, Dice(), SAMPLING, store, 0, progress=False)
    with pytest.raises(ValueError, match="'key 1'"):
        collect([*REQUESTS, REQUESTS[1]], Dice(), SAMPLING, store, 4, progress=False)

    class Short(Dice):
        def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Answer] | Failure]:
            return super().sample(requests, sampling)[1:]

    with pytest.raises(RuntimeError, match="3 results for 4 requests"):
        collect(REQUESTS, Short(), SAMPLING, store, 4, progress=False)
    assert store.keys() == set()


def test_batch_seeds_differ_and_last() -> None:
    seeds = {batch_seed(seed, key) for seed in range(20) for key in ("a", "b", "a b")}
    assert len(seeds) == 60 and all(0 <= seed < 2**31 for seed in seeds)
    assert batch_seed(0, "data:1") == 1342112723  # a collection that was begun goes on alike
