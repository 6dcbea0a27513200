"""The preference experiment of InternVL-tiny: its comparison against numpy, and all of its steps on few questions."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from internvl_hub.examples.internvl_tiny import preference
from internvl_hub.examples.internvl_tiny.preference_report import compare, format_changes


def test_changes_are_paired_by_question() -> None:
    generator = np.random.default_rng(0)
    before = {task: (generator.random(50) < 0.6).astype(float) for task in ("words", "sum")}
    after = [{task: (generator.random(50) < 0.7).astype(float) for task in before} for _ in range(3)]
    lists = [{task: hits.tolist() for task, hits in scores.items()} for scores in (before, *after)]
    changes = {change.task: change for change in compare(lists[0], lists[1:])}
    assert list(changes) == ["all", "sum", "words"]
    for task in ("words", "sum"):
        differences = np.mean([scores[task] for scores in after], axis=0) - before[task]
        assert changes[task].difference == pytest.approx(differences.mean())
        assert changes[task].error == pytest.approx(differences.std(ddof=1) / math.sqrt(50))
        assert changes[task].spread == pytest.approx(np.std([s[task].mean() for s in after], ddof=1))
    assert changes["all"].questions == 100
    assert changes["all"].before == pytest.approx(np.concatenate(list(before.values())).mean())


@pytest.mark.parametrize(
    ("after", "verdict"), [([1.0] * 20, "rises"), ([0.0] * 20, "falls"), ([1.0, 0.0] * 10, ""), ([0.0, 1.0] * 10, "")]
)
def test_only_more_than_two_standard_errors_count(after: list[float], verdict: str) -> None:
    (change, _) = compare({"words": [1.0, 0.0] * 10}, [{"words": after}])
    assert change.verdict == verdict
    assert format_changes([change]).splitlines()[-1].endswith(f"| {verdict} |")


def test_other_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="other questions"):
        compare({"words": [1.0, 0.0]}, [{"words": [1.0]}])


@pytest.mark.newest
def test_every_step_leaves_what_the_next_one_takes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    steps = ["training.max_steps=2", "training.logging_steps=1", "training.report_to=[]", "training.disable_tqdm=true"]
    sizes = ["--questions", "24", "--samples", "2", "--seeds", "1", "2"]
    preference.main([str(tmp_path), *steps, *sizes])
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip().endswith(str(tmp_path / "report.md"))
    assert "| all | 38 |" in report and "seeds 1, 2" in report  # 17 tasks, numbers three times
    assert (tmp_path / "report.png").stat().st_size > 10_000
    meta = json.loads((tmp_path / "pairs" / "meta.json").read_text(encoding="utf-8"))
    assert any(name.endswith("correctness_rules") for name in meta)
    state = json.loads((tmp_path / "seed-1" / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["global_step"] == 2 and "rewards/margins" in json.dumps(state["log_history"])
    # Nothing is done twice, and another split has other scores.
    checkpoint = (tmp_path / "seed-1" / "model.safetensors").stat().st_mtime_ns
    preference.main([str(tmp_path), *steps, *sizes, "--only", "train", "report"])
    assert (tmp_path / "seed-1" / "model.safetensors").stat().st_mtime_ns == checkpoint
