"""The plan of an epoch: every entry once, no budget exceeded, one length for all epochs, nearly full packs."""

import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_hub.training import batching, best_fit, packing, plans
from internvl_hub.training.batching import BatchPlanner, plan_batches
from internvl_hub.training.packing import EpochPlanner, plan_packs
from internvl_hub.training.plans import Packs

ENTRY = st.tuples(st.integers(1, 50), st.integers(0, 6))


# Of the small example below.
PLAN = [[6, 3, 1], [2, 4], [0], [5, 7]]
BATCHES = [[0, 1, 3], [5, 2, 6], [4, 7]]


def mixture(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and tiles as of a fine-tuning mixture: images of 1 to 13 tiles, text, a few videos of 8 to 32 frames."""
    draw = np.random.default_rng([seed, 99])
    kind = draw.choice(3, size=count, p=[0.72, 0.25, 0.03])
    tiles = np.choose(kind, [draw.integers(1, 14, count), np.zeros(count, dtype=int), draw.integers(8, 33, count)])
    text = np.choose(kind, [draw.lognormal(5.0, 0.8, count), draw.lognormal(5.5, 1.0, count), 300])
    return 256 * tiles + np.clip(text, 20, 4000).astype(int), tiles


def as_sets(packs: Packs) -> set[frozenset[int]]:
    return {frozenset(pack.tolist()) for pack in packs}


def assert_once(packs: Packs, entries: int) -> None:
    assert sorted(np.concatenate([*packs, []]).tolist()) == list(range(entries))


def assert_within(packs: Packs, tokens: np.ndarray, tiles: np.ndarray, max_tokens: int, max_tiles: int) -> None:
    for pack in packs:
        assert sum(tokens[entry] for entry in pack) <= max_tokens
        assert max(1, sum(tiles[entry] for entry in pack)) <= max_tiles  # text gets a dummy tile


# -------------------------------------------------------------------------------------------------------- one epoch


@settings(max_examples=150, deadline=None)
@given(
    entries=st.lists(ENTRY, max_size=60),
    spare=st.tuples(st.integers(0, 60), st.integers(0, 8)),
    window=st.integers(1, 8),
    epoch=st.integers(0, 3),
)
def test_each_entry_once_within_both_budgets(
    entries: list[tuple[int, int]], spare: tuple[int, int], window: int, epoch: int
) -> None:
    tokens, tiles = np.array([e[0] for e in entries], int), np.array([e[1] for e in entries], int)
    budgets = int(tokens.max(initial=1)) + spare[0], max(1, int(tiles.max(initial=0))) + spare[1]
    packs = plan_packs(tokens, tiles, *budgets, seed=3, epoch=epoch, window=window)
    assert_once(packs, len(entries))
    assert_within(packs, tokens, tiles, *budgets)
    assert all(len(pack) for pack in packs)
    again = plan_packs(tokens, tiles, *budgets, seed=3, epoch=epoch, window=window)
    assert [pack.tolist() for pack in again] == [pack.tolist() for pack in packs]


@settings(max_examples=100, deadline=None)
@given(st.lists(ENTRY, min_size=2, max_size=40), st.integers(0, 5))
def test_no_two_packs_could_be_one(entries: list[tuple[int, int]], seed: int) -> None:
    """While the window holds all packs, one is opened only where nothing else has room."""
    tokens, tiles = np.array([e[0] for e in entries]), np.array([e[1] for e in entries])
    packs = plan_packs(tokens, tiles, 70, 8, seed, epoch=0)
    sums = [(tokens[pack].sum(), tiles[pack].sum()) for pack in packs]
    for i, first in enumerate(sums):
        for second in sums[:i]:
            assert first[0] + second[0] > 70 or first[1] + second[1] > 8


BUDGETS = ((16384, 48), (8192, 40), (32768, 96), (34000, 135), (4096, 48), (16384, 64))


@pytest.mark.parametrize(("max_tokens", "max_tiles"), BUDGETS)
def test_packs_are_nearly_full(max_tokens: int, max_tiles: int) -> None:
    """Against the fewest packs that the tighter budget allows: no plan can do better than 1."""
    tokens, tiles = mixture(6000)
    fits = (tokens <= max_tokens) & (tiles <= max_tiles)
    tokens, tiles = tokens[fits], tiles[fits]
    fewest = max(np.ceil(tokens.sum() / max_tokens), np.ceil(tiles.sum() / max_tiles))
    for epoch in range(3):
        assert fewest / len(plan_packs(tokens, tiles, max_tokens, max_tiles, 0, epoch)) >= 0.98
    planner = EpochPlanner(tokens, tiles, max_tokens, max_tiles, seed=0)
    assert planner.fill.efficiency == pytest.approx(fewest / len(planner))
    assert planner.fill.tokens == pytest.approx(tokens.sum() / max_tokens / len(planner))
    assert planner.fill.tiles == pytest.approx(tiles.sum() / max_tiles / len(planner))


def lines_run(call: Callable[[], object]) -> int:
    """Lines of the planning modules that a call executes."""
    count, files = 0, {module.__file__ for module in (batching, best_fit, packing, plans)}

    def trace(frame: object, event: str, _: object) -> Callable | None:
        nonlocal count
        if frame.f_code.co_filename not in files:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def misfits(count: int) -> tuple[np.ndarray, np.ndarray]:
    """No two of these fit together: packs with much room of one kind stay open and are looked at in vain."""
    long = np.random.default_rng(0).random(count) < 0.6
    return np.where(long, 15000, 2000), np.where(long, 1, 40)


@pytest.mark.parametrize("lengths", [mixture, misfits])
def test_work_grows_linearly(lengths: Callable) -> None:
    """A search over all packs would make it 16 times."""
    few, many = (lines_run(lambda n=count: plan_packs(*lengths(n), 16384, 48, 0, 0)) for count in (1000, 4000))
    assert many < 4.5 * few


def test_order_of_packs_says_nothing_about_their_size() -> None:
    """What is left over at the end of packing is not at the end of the epoch."""
    tokens, tiles = mixture(3000)
    places = []
    for epoch in range(8):
        packs = plan_packs(tokens, tiles, 34000, 135, 0, epoch)
        sizes = [tokens[pack].sum() for pack in packs]
        places.append(int(np.argmin(sizes)) / len(packs))
    assert min(places) < 0.4 and max(places) > 0.6


def test_a_plan_never_changes() -> None:
    """A checkpoint is resumed with the plan of its epoch: other numbers here mean that no older run can be resumed."""
    tokens, tiles = np.array([9, 3, 7, 2, 5, 8, 1, 4]), np.array([2, 0, 1, 0, 1, 2, 0, 1])
    assert [p.tolist() for p in plan_packs(tokens, tiles, 12, 3, seed=42, epoch=1)] == PLAN
    assert [p.tolist() for p in plan_batches(tokens, 3, seed=42, epoch=1, group=True)] == BATCHES


def test_order_is_not_that_of_numpy_with_the_same_seed() -> None:
    """The data may have been shuffled with the run's seed; then best-fit would meet it sorted."""
    order = np.concatenate(list(plan_batches(np.ones(50, int), 50, seed=0, epoch=0)))
    assert order.tolist() != np.argsort(np.random.PCG64(0).random_raw(50)).tolist()


@pytest.mark.parametrize(
    ("tokens", "tiles", "options", "message"),
    [
        ([5, 99, 5], [0, 0, 0], {}, "entry 1 has 99 tokens, more than max_tokens=10"),
        ([5, 5], [0, 4], {}, "entry 1 has 4 tiles, more than max_tiles=3"),
        ([5, 0], [0, 0], {}, "tokens of entry 1 is 0, less than 1"),
        ([5, 5], [0, -1], {}, "tiles of entry 1 is -1"),
        ([5, 5], [0], {}, "tokens has 2 entries, tiles has 1"),
        ([5.0], [0], {}, "tokens must be a vector of integers"),
        ([5], [0], {"max_tiles": 0}, "max_tiles must be at least 1, got 0"),
        ([5], [0], {"seed": -1}, "must not be negative, got -1 and 0"),
    ],
    ids=["tokens", "tiles", "no-tokens", "negative-tiles", "lengths", "type", "budget", "seed"],
)
def test_refused(tokens: list, tiles: list, options: dict[str, int], message: str) -> None:
    arguments = {"max_tokens": 10, "max_tiles": 3, "seed": 0, "epoch": 0, **options}
    with pytest.raises(ValueError, match=message):
        plan_packs(np.array(tokens), np.array(tiles), **arguments)


# ------------------------------------------------------------------------------------------------------ all epochs


@settings(max_examples=60, deadline=None)
@given(st.lists(ENTRY, min_size=1, max_size=50), st.integers(1, 9), st.integers(0, 3))
def test_all_epochs_are_of_one_length(entries: list[tuple[int, int]], multiple: int, seed: int) -> None:
    tokens, tiles = np.array([e[0] for e in entries]), np.array([e[1] for e in entries])
    planner = EpochPlanner(tokens, tiles, 60, 7, seed, multiple)
    needed = len(plan_packs(tokens, tiles, 60, 7, seed, epoch=0))
    assert len(planner) == -(-needed // multiple) * multiple
    for epoch in range(20):
        packs = planner.packs(epoch)
        assert len(packs) == len(planner)
        assert_once(packs, len(entries))
        assert_within(packs, tokens, tiles, 60, 7)
        sizes = np.array([len(pack) for pack in packs])
        assert sizes.reshape(-1, multiple).any(axis=1).all()  # no step of empty packs only
        assert (sizes == 0).sum() == max(0, len(planner) - len(entries))


def test_epochs_differ_and_do_not_depend_on_those_before() -> None:
    tokens, tiles = mixture(400)
    planners = [EpochPlanner(tokens, tiles, 16384, 48, seed=1, multiple=4) for _ in range(2)]
    in_order = [planners[0].packs(epoch) for epoch in range(3)]
    alone = planners[1].packs(2)
    assert [p.tolist() for p in alone] == [p.tolist() for p in in_order[2]]
    assert len(as_sets(in_order[1]) & as_sets(in_order[2])) < len(alone) / 10
    other = EpochPlanner(tokens, tiles, 16384, 48, seed=2, multiple=4).packs(2)
    assert len(as_sets(other) & as_sets(alone)) < len(alone) / 10


def test_first_epoch_is_the_plan_where_nothing_is_rounded() -> None:
    tokens, tiles = mixture(300)
    packs = EpochPlanner(tokens, tiles, 16384, 48, seed=1).packs(0)
    assert [p.tolist() for p in packs] == [p.tolist() for p in plan_packs(tokens, tiles, 16384, 48, 1, 0)]


def test_missing_packs_come_from_those_with_most_entries() -> None:
    tokens, tiles = np.array([10] * 8 + [1] * 10), np.zeros(18, int)
    packs = EpochPlanner(tokens, tiles, 10, 1, seed=0, multiple=4).packs(0)
    assert len(packs) == 12  # 9 were needed: ten ones make one pack, which is halved three times
    assert sorted(len(pack) for pack in packs) == [1] * 8 + [2, 2, 3, 3]


def test_longer_epochs_are_packed_anew() -> None:
    """Epoch 0 happens to need fewer packs than others; these still have packs of their own."""
    tokens, tiles = (lengths[(mixture(1500)[0] <= 4096)] for lengths in mixture(1500))
    counts = [[len(plan_packs(tokens, tiles, 4096, 48, seed, epoch)) for epoch in range(4)] for seed in range(4)]
    seed, epoch = next((s, e) for s in range(4) for e in range(4) if counts[s][e] > counts[s][0])
    planner = EpochPlanner(tokens, tiles, 4096, 48, seed)
    packs = planner.packs(epoch)
    assert len(packs) == counts[seed][0]
    assert_once(packs, len(tokens))
    assert_within(packs, tokens, tiles, 4096, 48)
    assert len(as_sets(packs) & as_sets(planner.packs(0))) < len(packs) / 4


def test_epoch_that_stays_longer_has_the_packs_of_the_first() -> None:
    tokens, tiles = (lengths[(mixture(1000)[0] <= 4096)] for lengths in mixture(1000))
    found = []
    for seed in range(3):
        planner = EpochPlanner(tokens, tiles, 4096, 48, seed)
        first = planner.packs(0)
        for epoch in range(1, 8):
            packs = planner.packs(epoch)
            assert len(packs) == len(planner)
            if as_sets(packs) == as_sets(first):
                found.append(epoch)
                assert len(plan_packs(tokens, tiles, 4096, 48, seed, epoch)) > len(planner)
                assert [p.tolist() for p in first] != [p.tolist() for p in packs]  # in an order of its own
    assert 0 < len(found) < 7


@pytest.mark.parametrize(("multiple", "entries", "message"), [(0, 3, "multiple must be"), (2, 0, "no entry to plan")])
def test_planner_refuses(multiple: int, entries: int, message: str) -> None:
    lengths = np.ones(entries, int)
    with pytest.raises(ValueError, match=message):
        EpochPlanner(lengths, lengths, 10, 10, 0, multiple)
    with pytest.raises(ValueError, match=message):
        BatchPlanner(lengths, 2, 0, multiple=multiple)


# -------------------------------------------------------------------------------------------------- padded batches


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 99), min_size=1, max_size=70), st.integers(1, 5), st.integers(1, 6), st.booleans())
def test_batches(lengths: list[int], batch_size: int, multiple: int, group: bool) -> None:
    planner = BatchPlanner(np.array(lengths), batch_size, seed=0, group=group, multiple=multiple)
    for epoch in range(4):
        batches = planner.packs(epoch)
        assert_once(batches, len(lengths))
        sizes = np.array([len(batch) for batch in batches]).reshape(-1, multiple)
        assert len(batches) == len(planner)
        assert (sizes[:-1] == batch_size).all()  # only the last step is smaller, and shared evenly
        assert sizes[-1].any() and np.ptp(sizes[-1]) <= 1 and sizes.max() <= batch_size


def test_grouped_batches_have_like_lengths() -> None:
    lengths = np.random.default_rng(0).permutation(960)
    batches = plan_batches(lengths + 1, 4, seed=0, epoch=1, group=True, multiple=8)
    longest = [lengths[batch].max() for batch in batches]
    assert longest[0] == 959  # out of memory shows at once
    for step in np.array(longest).reshape(-1, 8):
        assert (np.diff(step) < 0).all()
    spread = [np.ptp(lengths[batch]) for batch in batches]
    free = [np.ptp(lengths[batch]) for batch in plan_batches(lengths + 1, 4, seed=0, epoch=1, multiple=8)]
    assert np.mean(spread) < np.mean(free) / 4
    steps = [set(np.concatenate(list(batches)[i : i + 8]).tolist()) for i in (0, 8)]
    again = list(plan_batches(lengths + 1, 4, seed=0, epoch=2, group=True, multiple=8))
    assert steps[1] != set(np.concatenate(again[8:16]).tolist())  # which entries meet is random


def test_batch_size_is_checked() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        plan_batches(np.ones(3, int), 0, seed=0, epoch=0)
