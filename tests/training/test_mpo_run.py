"""`internvl train` on pairs of answers: from a recipe and a jsonl to a folder with its report; adapters, refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, TrainerCallback
from transformers.utils import is_peft_available

from internvl_hub.app.cli import main
from internvl_hub.modeling_internvl_chat import InternVLChatModel
from internvl_hub.tests.training import tiny_models as tiny
from internvl_hub.training.merging import merge_adapter_folder
from internvl_hub.training.mpo import MPOTrainer
from internvl_hub.training.preference_report import is_preference_measure, write_preference_curves
from internvl_hub.training.recipe_fields import RecipeError
from internvl_hub.training.recipes import Recipe, load_recipe
from internvl_hub.training.run import describe, prepare, train
from internvl_hub.training.trainer import InternVLTrainer

ROOT = Path(__file__).resolve().parents[2]

TINY = ROOT / "checkpoints" / "internvl-tiny"
needs_peft = pytest.mark.skipif(not is_peft_available(), reason="needs peft")


def _data(folder: Path, count: int = 24) -> list[str]:
    """Pictures and a jsonl of pairs, as overrides."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(count):
        tiny.picture(i, (64, 64)).save(folder / "images" / f"{i}.png")
        answers = {"chosen": f"Number {i % 3}.", "rejected": f"I see {i % 5} of them."}
        rows.append({"id": i, "image": f"{i}.png", "question": "<image>\nWhich?", **answers})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [f"data.data_paths=[{folder / 'pairs.jsonl'}]", f"data.image_folders=[{folder / 'images'}]"]


def _common(folder: Path, *overrides: str) -> list[str]:
    return [
        f"model.model_name_or_path={TINY}", f"training.output_dir={folder / 'run'}", "training.report_to=none",
        f"data.index_cache={folder / 'cache'}", "training.logging_steps=1", "training.disable_tqdm=true", *overrides,
    ]  # fmt: skip


def _recipe(name: str, folder: Path, *overrides: str) -> Recipe:
    short = ("training.max_steps=4", "training.save_steps=2", "training.warmup_steps=0")
    return load_recipe(name, [*_data(folder), *_common(folder, *short), *overrides])


def _evaluation(folder: Path) -> list[str]:
    return [
        f"data.eval_data_paths=[{folder / 'pairs.jsonl'}]", f"data.eval_image_folders=[{folder / 'images'}]",
        "training.eval_strategy=steps", "training.eval_steps=4",
    ]  # fmt: skip


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return InternVLChatModel.from_pretrained(folder).state_dict()


def test_a_run_leaves_a_checkpoint_and_a_report_of_its_rewards(tmp_path: Path) -> None:
    overrides = ["training.max_steps=8", "training.learning_rate=1e-3", *_evaluation(tmp_path)]
    output = train(_recipe("tiny/mpo", tmp_path, *overrides))
    history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    evaluations = [entry for entry in history if "eval_loss" in entry]
    assert len(steps) == 8 and [entry["step"] for entry in evaluations] == [4, 8]
    assert steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)  # the policy still is the reference
    assert evaluations[-1]["eval_rewards/margins"] > 1 and evaluations[-1]["eval_rewards/accuracies"] == 1
    for entry in steps:  # the recipe's weights, which are the published ones
        terms = (entry[f"loss_{name}"] for name in ("preference", "quality", "generation"))
        weighted = zip((0.8, 0.2, 1.0), terms, strict=True)
        assert entry["loss"] == pytest.approx(sum(weight * term for weight, term in weighted), rel=1e-4)
    report = (output / "report.md").read_text(encoding="utf-8")
    assert "| reference | a frozen copy of the starting weights |" in report and "| beta | 0.1 |" in report
    last = report[report.index("last logged rewards/margins") :].splitlines()[0].split("|")[1]
    assert float(last) == pytest.approx(steps[-1]["rewards/margins"], rel=1e-3)
    again = load_recipe(output / "recipe.yaml")
    assert again.preference == load_recipe("tiny/mpo").preference is not None
    loaded = AutoModel.from_pretrained(output, trust_remote_code=True).state_dict()
    trained, start = _weights(output), _weights(TINY)
    assert all(torch.equal(value, loaded[name]) for name, value in trained.items())
    assert not all(torch.equal(value, start[name]) for name, value in trained.items())


@pytest.mark.newest
def test_a_resumed_run_is_compared_with_the_same_reference(tmp_path: Path) -> None:
    whole = train(_recipe("tiny/mpo", tmp_path / "a"))
    recipe = _recipe("tiny/mpo", tmp_path / "b")
    trainer = prepare(recipe)
    trainer.add_callback(_StopAfter(2))
    trainer.train()
    assert (tmp_path / "b" / "run" / "checkpoint-2").is_dir()
    resumed = _weights(train(recipe, resume=True))
    assert all(torch.equal(value, resumed[name]) for name, value in _weights(whole).items())


class _StopAfter(TrainerCallback):
    """Ends a training early, as a user would who comes back later."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@needs_peft
def test_adapters_are_compared_with_the_model_below_them(tmp_path: Path) -> None:
    parts = ["model.model_name_or_path=null", f"model.llm_path={TINY}", f"model.vision_path={TINY}"]
    recipe = _recipe("tiny/lora", tmp_path, *parts, "preference={}", "training.learning_rate=1e-2")
    trainer = prepare(recipe)
    assert isinstance(trainer, MPOTrainer) and "compared with the model without its adapters" in describe(trainer)
    output = train(recipe)
    assert (output / "adapter_config.json").is_file() and not (output / "model.safetensors").exists()
    merge_adapter_folder(output, tmp_path / "merged")
    base, merged = _weights(output / "base"), _weights(tmp_path / "merged")
    changed = {name.split(".")[0] for name, value in merged.items() if not torch.equal(value, base[name])}
    assert changed == {"language_model"}
    assert "the model without its adapters" in (output / "report.md").read_text(encoding="utf-8")


@pytest.mark.newest
def test_a_reference_can_be_precomputed_or_another_checkpoint(tmp_path: Path) -> None:
    cache = tmp_path / "values"
    precomputed = ["preference.precompute_reference=true", f"preference.reference_cache={cache}"]
    plain = _weights(train(_recipe("tiny/mpo", tmp_path / "a")))
    read = _weights(train(_recipe("tiny/mpo", tmp_path / "b", *precomputed)))
    other = _weights(train(_recipe("tiny/mpo", tmp_path / "c", f"preference.reference_path={TINY}")))
    assert any(cache.iterdir())
    for name, value in plain.items():
        torch.testing.assert_close(read[name], value, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6)
    assert f"| reference | {TINY} |" in (tmp_path / "c" / "run" / "report.md").read_text(encoding="utf-8")


def test_the_command_names_pairs_and_their_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _data(tmp_path)
    assert main(["train", "--dry-run", "tiny/mpo", *data, *_common(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "24 pairs of answers an epoch, 0 of them left out" in shown
    assert "compared with a frozen copy of the starting weights" in shown and re.search(r"\d steps an epoch", shown)


def test_conversations_are_trained_on_without_the_section(tmp_path: Path) -> None:
    """Of a pair, a run on conversations learns the chosen answer, and says nothing of preferences."""
    trainer = prepare(_recipe("tiny/mpo", tmp_path, "preference=null"))
    assert type(trainer) is InternVLTrainer and "pairs" not in describe(trainer)


def test_a_reference_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"preference.reference_path: ./nowhere does not exist"):
        prepare(_recipe("tiny/mpo", tmp_path, "preference.reference_path=./nowhere"))


# ------------------------------------------------------------------------------------------------------------ pictures


def test_curves_show_every_logged_metric(tmp_path: Path, drawn_figures: list[Any]) -> None:
    history = [
        {"step": 1, "loss": 3.0, "loss_preference": 0.7, "rewards/margins": 0.0, "rewards/accuracies": 0.0},
        {"step": 2, "eval_rewards/margins": 0.5, "eval_val_rewards/margins": 0.25, "eval_logps/chosen": -30.0},
        {"step": 3, "loss": 2.0, "loss_preference": 0.5, "rewards/margins": 1.0, "rewards/accuracies": 1.0},
    ]
    write_preference_curves(tmp_path / "curves.png", history)
    drawn = [{line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in drawn_figures[0].axes]
    assert drawn == [
        {"preference": [[1, 0.7], [3, 0.5]]},
        {"margin": [[1, 0], [3, 1]], "margin, evaluation": [[2, 0.5]], "margin, val": [[2, 0.25]]},
        {"chosen above rejected": [[1, 0], [3, 1]]},
    ]
    assert (tmp_path / "curves.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("key", "belongs"),
    [("eval_rewards/margins", True), ("eval_val_logps/chosen", True), ("eval_reward_shift", True),
     ("eval_loss_quality", True), ("eval_loss", False), ("eval_exact_match", False), ("rewards/margins", False)],
)  # fmt: skip
def test_measures_of_pairs_have_a_picture_of_their_own(key: str, belongs: bool) -> None:
    assert is_preference_measure(key) == belongs
