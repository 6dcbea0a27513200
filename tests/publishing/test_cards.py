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
from internvl_hub.publishing.command import _check_evaluations
from internvl_hub.training.recipes import dump_recipe, load_recipe
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


def test_folders_that_look_like_hub_names_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of recipes from before they were marked: from wherever the run is published."""
    (tmp_path / "runs" / "stage1").mkdir(parents=True)
    recipe = yaml.safe_dump({"model": {"model_name_or_path": "runs/stage1"}})
    run = write(tmp_path / "runs" / "stage2", {"recipe.yaml": recipe})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    facts = run_facts.read_run(run)
    assert facts is not None and facts.bases == [] and "Began" not in facts.summary


def test_recipes_mark_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nobody takes them for Hub names once they are gone."""
    (tmp_path / "runs" / "vit").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"own.yaml": "model: {vision_path: runs/vit, llm_path: Qwen/Qwen3-0.6B, mlp_path: ../x.pt}"})
    text = dump_recipe(load_recipe("own.yaml"))
    assert load_recipe(write(tmp_path, {"again.yaml": text}) / "again.yaml").model.vision_path == "runs/vit"
    (tmp_path / "runs" / "vit").rmdir()
    facts = run_facts.read_run(write(tmp_path / "moved", {"recipe.yaml": text}))
    assert facts is not None and facts.bases == ["Qwen/Qwen3-0.6B"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/John Smith/secret project/run 1", "run 1"),
        (r"C:\Users\alice\secret dir\x.json", "x.json"),
        (r"\\server\alice\x.json", "x.json"),
        (r"%USERPROFILE%\alice\x", "x"),
        ("configs/alice/zero3.json", "zero3.json"),
        ("$HOME/alice/x", "x"),
        ("~alice/x", "x"),
        ("file:///home/alice/x", "x"),
        (["/home/John Smith/a", {"key": "/home/John Smith/b"}], "a, {key: b}"),
        ("torch in /home/alice/env/bin, key=/home/alice/y", "torch in bin, key=y"),
        ("https://huggingface.co/org/data/resolve/main/x.json", "https://huggingface.co/org/data/resolve/main/x.json"),
        ("see https://a.org/b/c/d", "see https://a.org/b/c/d"),
        ("OpenGVLab/InternVL3-1B", "OpenGVLab/InternVL3-1B"),
        ("and/or, 4 / 5", "and/or, 4 / 5"),
        ("a </s> b", "a &lt;/s> b"),
    ],
    ids=range(15),
)
def test_of_paths_the_last_part_is_shown(value: Any, shown: str) -> None:
    assert run_facts.clean(value) == shown


def test_paths_with_spaces_in_tables_of_a_report(run: Path) -> None:
    write(run, {"report.md": "## Data\n\n| data set | n |\n|---|---:|\n| /home/John Smith/a b.jsonl | 1 |\n"})
    facts = run_facts.read_run(run)
    assert facts is not None and dict(facts.tables)["Data"].splitlines()[1:] == ["|---|---:|", "| a b.jsonl | 1 |"]


def test_credentials_of_a_recipe_are_no_settings(tmp_path: Path) -> None:
    recipe = {1: 2, "training": {3: 4, "hub_token": "x", "WANDB_API_KEY": "x", "max_packed_tokens": 8}}
    facts = run_facts.read_run(write(tmp_path, {"recipe.yaml": yaml.safe_dump(recipe, sort_keys=False)}))
    assert facts is not None
    assert dict(facts.tables)["Settings"].splitlines()[2:] == [
        "| 1 | 2 |", "| training.3 | 4 |", "| training.max_packed_tokens | 8 |"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("null", "holds a NoneType"), ("[]", "holds a list"), ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"global_step": null}', "global_step must be"), ('{"global_step": "x"}', "global_step must be"),
        ('{"log_history": null}', "log_history must be"), ('{"log_history": ["loss"]}', "log_history must be"),
    ],
    ids=range(8),
)  # fmt: skip
def test_broken_states(run: Path, state: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_facts.read_run(write(run, {"trainer_state.json": state}))


def test_recipe_that_holds_itself(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it holds itself"):
        run_facts.read_run(write(tmp_path, {"recipe.yaml": "&a {model: *a}"}))


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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("settings", "x"), ("preset", {"title": None, "name": "n"}), ("preset", {"title": "t", "name": ["n"]}),
        ("metric", {}), ("unit", ["x"]), ("error", "x"), ("questions", {"scored": "3", "missing": 0}),
    ],
    ids=range(7),
)  # fmt: skip
def test_reports_of_wrong_types(tmp_path: Path, name: str, value: Any) -> None:
    path = _report(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(ValueError, match="is no report.json"):
        evaluations.read_report(path)


def test_report_without_settings_passes_the_comparison_of_weights(tmp_path: Path, checkpoint: Path) -> None:
    _check_evaluations(checkpoint, [str(_report(tmp_path, settings=None))])


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


def test_own_card_with_a_byte_order_mark(tmp_path: Path, run: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"\xef\xbb\xbf---\nlicense: mit\n---\n# Mine\n")
    card = _card(tmp_path, run, base_model="a/b")
    assert (card.data.license, card.data.base_model, card.text.strip()) == ("mit", "a/b", "# Mine")


def test_scores_are_written_into_the_table_of_a_card_and_nowhere_else(tmp_path: Path, run: Path) -> None:
    _card(tmp_path, run, evaluations=[_report(tmp_path / "a"), _report(tmp_path / "b", "mme", 2100.5)])
    before = (tmp_path / "README.md").read_text() + "\n| DocVQA | anls, mean score | mine | | |\n"
    (tmp_path / "README.md").write_text(before)
    card = _card(
        tmp_path, run, evaluations=[_report(tmp_path / "a", score=0.9), _report(tmp_path / "c", "chartqa", 0.25)]
    )
    chart = find_preset("chartqa")
    assert "87.50" not in card.text and "| DocVQA | anls, mean score | mine | | |" in card.text
    rows = [line.split(" | ")[0] for line in card.text.splitlines() if line.endswith("| 10 |")]
    assert rows == ["| DocVQA", f"| {find_preset('mme').title}", f"| {chart.title}"] and "| 90.00 % |" in card.text


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
