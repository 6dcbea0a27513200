"""Votes and pass@k against counting by hand and by drawing every subset."""

from itertools import combinations

import pytest

from internvl_hub.evaluation.voting import Vote, majority, pass_at_k

VOTES = {
    "most": (["a", "b", "b"], Vote(1, 2, 3)),
    "first of equals": (["b", "a", "a", "b"], Vote(0, 2, 4)),
    "the unreadable do not vote": ([None, None, "a", None], Vote(2, 1, 1)),
    "none": ([None, None], Vote(None, 0, 0)),
    "no answers": ([], Vote(None, 0, 0)),
    "an empty label votes": (["", "", "a"], Vote(0, 2, 3)),
}


@pytest.mark.parametrize("name", VOTES)
def test_majority(name: str) -> None:
    labels, expected = VOTES[name]
    assert majority(labels) == expected


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(samples: int) -> None:
    for right in range(samples + 1):
        answers = [True] * right + [False] * (samples - right)
        for k in range(1, samples + 1):
            subsets = [any(subset) for subset in combinations(answers, k)]
            assert pass_at_k(right, samples, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


@pytest.mark.parametrize(("right", "samples", "k"), [(3, 2, 1), (-1, 2, 1), (1, 2, 3), (1, 2, 0)])
def test_bad_arguments(right: int, samples: int, k: int) -> None:
    with pytest.raises(ValueError, match="need 0 <= right"):
        pass_at_k(right, samples, k)
