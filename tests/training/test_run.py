"""`internvl train`: from a recipe and a jsonl to a folder that others load; interruptions, adapters, refusals."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, TrainerCallback

from internvl_hub.app.cli import main
from internvl_hub.modeling_internvl_chat import InternVLChatModel
from internvl_hub.tests.training import tiny_models as tiny
from internvl_hub.training.merging import merge_adapter_folder
from internvl_hub.training.recipe_fields import RecipeError
from internvl_hub.training.recipes import Recipe, load_recipe
from internvl_hub.training.run import InterruptedRunError, prepare, train

ROOT = Path(__file__).resolve().parents[2]


def _data(folder: Path, count: int = 20) -> list[str]:
    """Pictures and a jsonl, as overrides."""
    images = folder / "images"
    images.mkdir()
    rows = []
    for i in range(count):
        tiny.picture(i, (64, 64)).save(images / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": f"Number {i % 3}."}]
        rows.append({"id": i, "image": f"{i}.png", "conversations": turns})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [f"data.data_paths=[{folder / 'train.jsonl'}]", f"data.image_folders=[{images}]"]


def _recipe(name: str, folder: Path, *overrides: str) -> Recipe:
    given = [
        *_data(folder), f"model.model_name_or_path={ROOT / 'checkpoints' / 'internvl-tiny'}",
        f"training.output_dir={folder / 'run'}", f"data.index_cache={folder / 'cache'}", "training.report_to=none",
        "training.max_steps=4", "training.save_steps=2", "training.logging_steps=1", "training.disable_tqdm=true",
        *overrides,
    ]  # fmt: skip
    return load_recipe(name, given)


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_packed_run_leaves_a_checkpoint_that_loads_anywhere(tmp_path: Path) -> None:
    recipe = _recipe("tiny/packed", tmp_path, "data.eval_data_paths=[" + str(tmp_path / "train.jsonl") + "]",
                     f"data.eval_image_folders=[{tmp_path / 'images'}]", "training.max_steps=10")  # fmt: skip
    output = train(recipe)
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 10 and losses[-1] < 0.5 * losses[0]
    assert all({"tokens_per_second", "efficiency", "skipped"} <= entry.keys() for entry in state["log_history"][:10])
    assert [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    report = (output / "report.md").read_text(encoding="utf-8")
    assert "packing efficiency" in report and "| train | 20 | 0 |" in report and "eval" in report.lower()
    again = load_recipe(output / "recipe.yaml")
    assert again.model == recipe.model and again.data == recipe.data
    loaded = AutoModel.from_pretrained(output, trust_remote_code=True)
    trained = InternVLChatModel.from_pretrained(output)
    for name, value in trained.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


class _Signal(TrainerCallback):
    """Sends this process a signal during a step."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_is_saved_and_goes_on(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    options = ["training.max_steps=6", "training.save_steps=100"]
    whole = _weights(InternVLChatModel.from_pretrained(train(_recipe("tiny/stage2", tmp_path / "a", *options))))
    recipe = _recipe("tiny/stage2", tmp_path / "b", *options)
    trainer = prepare(recipe)
    trainer.add_callback(_Signal(2, number))
    monkeypatch.setattr("internvl_hub.training.run.prepare", lambda *args: trainer)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(InterruptedRunError, match="of 6; the same command with --resume"):
        train(recipe)
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "b" / "run").glob("checkpoint-*")] == [
        f"checkpoint-{trainer.state.global_step}"
    ]
    assert trainer.state.global_step < 6
    with pytest.raises(RecipeError, match="holds checkpoint-.* of an earlier run: --resume continues it"):
        train(recipe)
    resumed = _weights(InternVLChatModel.from_pretrained(train(recipe, resume=True)))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_adapters_of_a_model_made_from_parts_have_a_base(tmp_path: Path) -> None:
    source = ROOT / "checkpoints" / "internvl-tiny"
    parts = ["model.model_name_or_path=null", f"model.llm_path={source}", f"model.vision_path={source}"]
    output = train(_recipe("tiny/lora", tmp_path, *parts, "training.freeze_mlp=false"))
    assert (output / "adapter_config.json").is_file() and not (output / "model.safetensors").exists()
    base = InternVLChatModel.from_pretrained(output / "base")
    merge_adapter_folder(output, tmp_path / "merged")
    merged = InternVLChatModel.from_pretrained(tmp_path / "merged")
    changed = {
        name.split(".")[0]
        for name, value in merged.state_dict().items()
        if not torch.equal(value, base.state_dict()[name])
    }
    assert changed == {"language_model", "mlp1"}
    assert merged.config.to_dict()["template"] == base.config.to_dict()["template"]


def test_rows_that_cannot_be_used_are_counted_and_stop_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = _recipe("tiny/packed", tmp_path, "data.max_skip_share=0.1")
    (tmp_path / "images" / "3.png").unlink()
    trainer = prepare(recipe)
    assert trainer.accounts.unusable() == {"train": 1}
    (tmp_path / "images" / "4.png").write_bytes(b"")
    (tmp_path / "images" / "5.png").write_bytes(b"GIF89a")
    arguments = [f"{section}.{key}={value}" for section, key, value in (
        ("model", "model_name_or_path", recipe.model.model_name_or_path),
        ("data", "data_paths", f"[{recipe.data.data_paths[0]}]"),
        ("data", "image_folders", f"[{recipe.data.image_folders[0]}]"),
        ("data", "index_cache", tmp_path / "cache2"), ("data", "max_skip_share", 0.1),
        ("training", "output_dir", tmp_path / "other"), ("training", "report_to", "none"))]  # fmt: skip
    assert main(["train", "tiny/packed", *arguments]) == 1
    assert "train: 3 of 20 rows cannot be used, more than max_skip_share=0.1" in capsys.readouterr().err


def test_the_command_explains_what_it_would_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _data(tmp_path)
    model = f"model.model_name_or_path={ROOT / 'checkpoints' / 'internvl-tiny'}"
    common = ["tiny/stage1", *data, model, f"training.output_dir={tmp_path / 'run'}", "training.report_to=none"]
    assert main(["train", "--dry-run", *common]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"vision_model +0 of +1,279,840 parameters are trained", shown)
    assert "20 entries an epoch, 0 of them left out" in shown and "steps an epoch" in shown
    assert main(["train", "tiny/stage1", "data.data_paths=[nothing.jsonl]"]) == 1
    assert "nothing.jsonl does not exist" in capsys.readouterr().err
    assert main(["train", "--list"]) == 0
    assert "internvl2_5/8b_stage2" in capsys.readouterr().out.split()


def test_a_run_goes_on_only_with_its_own_plan(tmp_path: Path) -> None:
    train(_recipe("tiny/packed", tmp_path, "training.max_steps=2"))
    again = [f"training.output_dir={tmp_path / 'run'}", "training.max_steps=4", "training.report_to=none"]
    again += [f"model.model_name_or_path={ROOT / 'checkpoints' / 'internvl-tiny'}"]
    again += [f"data.data_paths=[{tmp_path / 'train.jsonl'}]", f"data.image_folders=[{tmp_path / 'images'}]"]
    again += [f"data.index_cache={tmp_path / 'cache'}"]
    for other in ("training.seed=7", "training.max_packed_tokens=512", "global_batch_size=2"):
        with pytest.raises(ValueError, match="other data, limits, batch sizes"):
            train(load_recipe("tiny/packed", [*again, other]), resume=True)
    assert (train(load_recipe("tiny/packed", again), resume=True) / "checkpoint-4").is_dir()
