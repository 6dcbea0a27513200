"""The tiny recipe from end to end in two steps, and the curriculum that feeds it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import CHAT, QWEN2, assert_same

from internvl_hub.examples.internvl_tiny import evaluate, model, train
from internvl_hub.examples.internvl_tiny.model import MixtureRecords, Stage
from internvl_hub.examples.internvl_tiny.tasks import TASKS
from internvl_hub.examples.internvl_tiny.train import SortedBlocks


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> train.InternVLTrainer:
    """The recipe cut down to two steps of four rows."""
    recipe = model.load_recipe()
    recipe["batch_size"] = 4
    recipe["training"] |= {"per_device_train_batch_size": 2, "dataloader_num_workers": 0, "warmup_steps": 0}
    recipe["stages"] = [{"steps": 1, "max_tiles": 1, "weights": {"numbers": 1.0}}, {"steps": 1, "max_tiles": 7}]
    recipe["held_out"] = {"every": 1, "samples": 4}
    trainer = train.make_trainer(recipe, tmp_path_factory.mktemp("work"))
    trainer.args.disable_tqdm = True
    trainer.recipe = recipe
    return trainer


def test_small_enough_to_ship(trainer: train.InternVLTrainer) -> None:
    assert sum(parameter.numel() for parameter in trainer.model.parameters()) * 4 < 12e6


def test_folder_of_a_short_run(
    trainer: train.InternVLTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    trainer.train()
    train.write_checkpoint(trainer, trainer.recipe, tmp_path, per_task=1)
    names = {path.name for path in tmp_path.iterdir()}
    assert not {name for name in names if name.endswith((".py", ".bin"))}
    assert names >= {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "processor_config.json", "README.md", "loss_curve.png", "trainer_state.json",
    }  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(config["auto_map"]) >= {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert config["img_context_token_id"] == 5
    assert "| numbers | 3 |" in (tmp_path / "README.md").read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["evaluate", str(tmp_path), "--samples", "1", "--split", "val"])
    evaluate.main()
    assert f"| all | {len(TASKS) + 2} |" in capsys.readouterr().out


def test_training_goes_on_from_earlier_weights(root: Path, tmp_path: Path) -> None:
    start = root / "checkpoints" / "internvl-tiny"
    recipe = model.load_recipe()
    recipe["stages"] = [{"steps": 1, "max_tiles": 1}]
    trainer = train.make_trainer(recipe, tmp_path, start)
    stored = load_file(start / "model.safetensors")
    assert_same(trainer.model.state_dict(), {name: tensor.float() for name, tensor in stored.items()})
    assert trainer.model.dtype == torch.float32
    with pytest.raises(ValueError, match="another vocabulary"):
        train.make_trainer(recipe, tmp_path, CHAT / QWEN2)


def test_curriculum(trainer: train.InternVLTrainer) -> None:
    stages = [Stage(2, 1, {"numbers": 1.0}, (1, 1)), Stage(3, 7, {"color": 1.0}, (1, 1))]
    records = MixtureRecords(stages, 4, 0, trainer.processing_class.image_processor)
    assert len(records) == 20
    first, second = [records[i] for i in range(8)], [records[i] for i in range(8, 20)]
    tiles = trainer.processing_class.image_processor.num_tiles
    assert all(tiles(*record.images[0].size) == 1 for record in first)
    assert all(record.messages[1].text.isdigit() for record in first)
    assert not any(record.messages[1].text.isdigit() for record in second)
    assert len({record.where for record in first + second}) == 20
    assert records[3].messages == MixtureRecords(stages, 4, 0, trainer.processing_class.image_processor)[3].messages


def test_sorted_blocks_keep_every_row_of_a_batch(trainer: train.InternVLTrainer) -> None:
    blocks = SortedBlocks(trainer.train_dataset.dataset, micro=2, parts=4)
    order = blocks._order(0)
    assert sorted(order) == list(range(8))
    sizes = [blocks._size(blocks.dataset.records[row]) for row in order]
    micro = [sum(sizes[i : i + 2]) for i in range(0, 8, 2)]
    # Ranks take micro-batches in turn: the first gets the smallest and the largest, the second the two between.
    assert micro[0] == min(micro)
    assert micro[3] <= micro[2] == max(micro)
