"""The exported tasks and the three stages over them, in the order of the page of settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from internvl_hub.app.cli import main
from internvl_hub.examples.internvl_tiny.export import export
from internvl_hub.modeling_internvl_chat import InternVLChatModel

ROOT = Path(__file__).resolve().parents[2]

STAGES = ROOT / "examples" / "internvl_tiny" / "stages"


def _changed(before: Path, after: Path) -> set[str]:
    old, new = (InternVLChatModel.from_pretrained(folder).state_dict() for folder in (before, after))
    return {name.split(".")[0] for name, value in new.items() if not torch.equal(value, old[name])}


@pytest.mark.newest
def test_the_stages_follow_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    data = tmp_path / "build" / "tiny-data"
    for split in ("train", "val"):
        rows = export(data, 6, split).read_text(encoding="utf-8").splitlines()
        assert all((data / "images" / row["image"]).is_file() for row in map(json.loads, rows) if "image" in row)
    common = ["training.max_steps=1", "global_batch_size=1", "data.repeat_times=[1]", "training.report_to=none"]
    common += ["training.eval_steps=1", "training.eval_generations=2", "training.dataloader_num_workers=0"]
    common += ["data.index_cache=cache", "training.warmup_steps=0", "data.max_skip_share=0.5"]
    for stage in ("stage1", "stage1_5", "stage2"):
        assert main(["train", str(STAGES / f"{stage}.yaml"), *common]) == 0
    first, second, third = (tmp_path / "build" / f"tiny-{stage}" for stage in ("stage1", "stage1_5", "stage2"))
    assert _changed(tmp_path / "checkpoints" / "internvl-tiny", first) == {"mlp1"}
    assert _changed(first, second) == {"vision_model", "mlp1"}
    assert _changed(second, third) == {"vision_model", "mlp1", "language_model"}
    assert "exact_match" in (third / "report.md").read_text(encoding="utf-8")
