"""Model cards of runs and evaluations: what they say, and what they must not tell."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from publishing_fakes import write

from internvl_hub.evaluation.presets import find_preset
from internvl_hub.evaluation.questions import Question
from internvl_hub.evaluation.report import build_report
from internvl_hub.evaluation.totals import TOTALS
from internvl_hub.publishing import cards, evaluations, run_facts
from internvl_hub.upload_to_hub import LayoutError, gather

TASK = "image-text-to-text"
RECIPE = {
    "global_batch_size": 8,
    "model": {"model_name_or_path": "OpenGVLab/InternVL3-1B", "drop_path_rate": 0.1},
    "data": {"data_paths": ["/home/alice/secret-project/train.jsonl"], "index_cache": "/home/alice/cache"},
    "training": {"learning_rate": 2e-5, "output_dir": "/home/alice/runs/a", "weight_decay": 0.05},
}
STATE = {"global_step": 1200, "epoch": 1.0, "log_history": [{"step": 1, "loss": 3.0}, {"step": 1200, "loss": 0.5}]}
REPORT = """# Run a

Python 3.11.7, internvl-hub 0.1.0, torch 2.13.0

## Data

| data set | entries of an epoch |
|---|---:|
| /home/alice/secret-project/train.jsonl | 1,000 |
| <script>alert(1)</script> | 2 |

## Settings

| /home/alice | 1 |
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    files = {"recipe.yaml": yaml.safe_dump(RECIPE), "trainer_state.json": json.dumps(STATE), "report.md": REPORT}
    return write(tmp_path / "run", files)


def _report(folder: Path, preset: str = "docvqa", score: float = 0.875, missing: int = 0, **more: Any) -> Path:
    """As the evaluator itself writes it, with another score."""
    settings = {"preset": find_preset(preset).as_dict(), "model": "m", "sampling": {"n": 1}}
    report = build_report([], settings, find_preset(preset).metric, find_preset(preset).totals, missing, {})
    content = {
        **report.content,
        "score": score,
        "error": 0.01,
        "questions": {"scored": 10, "missing": missing},
        **more,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(content))
    return folder / "report.json"


def _card(path: Path, run: Path, **options: Any) -> ModelCard:
    cards.write(path / "README.md", run, TASK, "user/name", **options)
    return ModelCard.load(path / "README.md")


def test_run_is_described(tmp_path: Path, run: Path) -> None:
    card = _card(tmp_path, run, license="mit")
    assert card.data.base_model == "OpenGVLab/InternVL3-1B" and card.data.license == "mit"
    for text in (
        "Began with `OpenGVLab/InternVL3-1B`", "1,200 steps, 1 epochs; the last logged loss is 0.5", "torch 2.13.0",
        "| training.learning_rate | 2e-05 |", "| global_batch_size | 8 |", "| train.jsonl | 1,000 |", "`mit`",
    ):  # fmt: skip
        assert text in card.content, text


def test_card_tells_nothing_of_the_machine(tmp_path: Path, run: Path) -> None:
    text = _card(tmp_path, run).content
    assert "alice" not in text and "secret-project" not in text and "<script" not in text


def test_local_bases_are_no_hub_names(tmp_path: Path) -> None:
    model = {"vision_path": "/home/alice/vit", "llm_path": "Qwen/Qwen3-0.6B", "mlp_path": str(tmp_path)}
    run = write(tmp_path / "run", {"recipe.yaml": yaml.safe_dump({"model": model})})
    facts = run_facts.read_run(run)
    assert facts is not None and facts.bases == ["Qwen/Qwen3-0.6B"] and "alice" not in str(facts)


def test_folder_of_no_run(tmp_path: Path) -> None:
    assert run_facts.read_run(tmp_path) is None
    assert "## Training" not in _card(tmp_path, tmp_path).content


@pytest.mark.parametrize("text", ["a: [", "- a", "\x00"])
def test_broken_recipe(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="is no recipe"):
        run_facts.read_run(write(tmp_path, {"recipe.yaml": text}))


def test_evaluations_are_a_model_index(tmp_path: Path, run: Path) -> None:
    reports = [_report(tmp_path / "a"), _report(tmp_path / "b", "mme", 2100.5)]
    card = _card(tmp_path, run, evaluations=reports)
    (index,) = yaml.safe_load(card.content.split("---")[1])["model-index"]
    found = {
        result["dataset"]["name"]: (result["dataset"]["type"], metric["type"], metric["value"])
        for result in index["results"]
        for metric in result["metrics"]
    }
    mme = find_preset("mme")
    assert index["name"] == "name" and found["DocVQA"] == ("docvqa", "anls", 87.5)
    assert found[mme.title][2] == 2100.5 and TOTALS[mme.totals]([]).unit == "points"
    assert "| DocVQA | anls, mean score | 87.50 % | 1.00 | 10 |" in card.content


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"missing": 3}, "incomplete, 3 questions"), ({"score": None}, "no score"), ({"preset": {}}, "no report.json")],
)
def test_reports_that_say_too_little(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluations.read_report(_report(tmp_path, **changes) if "preset" not in changes else _bare(tmp_path))


def _bare(folder: Path) -> Path:
    return write(folder, {"report.json": '{"score": 1, "preset": {}}'}) / "report.json"


def test_hostile_title_stays_data(tmp_path: Path, run: Path) -> None:
    path = _report(tmp_path / "a")
    content = json.loads(path.read_text())
    content["preset"]["title"] = "x | <b>\n---\nlicense: [gpl]: {{ 7 * 7 }}"
    path.write_text(json.dumps(content))
    card = _card(tmp_path, run, license="mit", evaluations=[path])
    assert (
        card.data.license == "mit" and "<b>" not in card.content and "49" not in card.text.split("## Evaluation")[-1]
    )


def test_own_card_keeps_its_text(tmp_path: Path, run: Path) -> None:
    own = "---\nlicense: mit\ntags: [mine]\n---\n\n# Mine\n\nText.\n"
    write(tmp_path, {"README.md": own})
    cards.write(tmp_path / "README.md", run, TASK, "user/name")
    assert (tmp_path / "README.md").read_text() == own
    card = _card(tmp_path, run, base_model=["a/b"], evaluations=[_report(tmp_path / "a")])
    assert (card.data.license, card.data.base_model, card.data.tags) == ("mit", "a/b", ["mine"])
    assert card.text.strip() == "# Mine\n\nText." and card.data.eval_results[0].metric_value == 87.5
    card = _card(tmp_path, run, evaluations=[_report(tmp_path / "a", score=0.9)])
    assert [each.metric_value for each in card.data.eval_results] == [90.0]


def test_gathering_describes_the_run(checkpoint: Path, code_root: Path, run: Path, tmp_path: Path) -> None:
    for path in run.iterdir():
        path.rename(checkpoint / path.name)
    write(checkpoint, {"loss_curve.png": "x"})
    files = gather(checkpoint, tmp_path / "out", code_root=code_root, repo_id="user/name")
    assert {"loss_curve.png", "README.md"} < {file.name for file in files} and "recipe.yaml" not in map(str, files)
    assert "![Training loss](loss_curve.png)" in (tmp_path / "out" / "README.md").read_text()
    write(checkpoint, {"recipe.yaml": "a: ["})
    with pytest.raises(LayoutError, match="is no recipe"):
        gather(checkpoint, tmp_path / "other", code_root=code_root)


def test_questions_have_the_shape_that_reports_count() -> None:
    """`questions.scored` and `unit` are what the table reads: the evaluator's own names."""
    assert {"answers", "category"} <= set(Question.__dataclass_fields__)
    assert {"score", "error", "unit"} <= set(TOTALS["mean"]([]).__dataclass_fields__)
