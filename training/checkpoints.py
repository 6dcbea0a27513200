"""Checkpoints of a run: every weight restored or an error, adapters with their configuration, the last whole one.

`WholeCheckpoints` is a part of `InternVLTrainer`; it relies on `Trainer`'s attributes.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from .accounts import RunAccounts

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")

_Base = Trainer if TYPE_CHECKING else object


def find_last_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The newest checkpoint of a run that was written to its end, None if there is none.

    `Trainer` writes `trainer_state.json` after everything else of its rank; the random states of the other ranks are
    looked for by the number of processes that the run had.
    """
    folder = Path(folder)
    found = [
        (int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _CHECKPOINT.fullmatch(path.name))
    ]
    return next((path for _, path in sorted(found, reverse=True) if _is_whole(path)), None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    counts = state.get("stateful_callbacks", {}).get(RunAccounts.__name__, {})
    ranks = counts["attributes"].get("world_size", 1) if isinstance(counts, dict) and "attributes" in counts else 1
    return ranks == 1 or all((checkpoint / f"rng_state_{rank}.pth").is_file() for rank in range(ranks))


class WholeCheckpoints(_Base):
    """Loading and saving, as `Trainer`'s but for what it would lose without a word."""

    image_processor: Any

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As the parent's, which has the model's `load_state_dict` translate names on disk; shards all at once."""
        if not self._load_shards(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """As the parent's, which would go on with the last weights if those of the best checkpoint were not there.

        Raises:
            FileNotFoundError: the best checkpoint has no weights.
        """
        folder = self.state.best_model_checkpoint
        if self._load_shards(folder):
            return
        if not self._has_own_format() and not [*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.bin")]:
            raise FileNotFoundError(
                f"the best checkpoint {folder} has no weights on this machine; was it deleted? On several machines "
                "without a shared disk set save_on_each_node=True"
            )
        super()._load_best_model()

    def _has_own_format(self) -> bool:
        """Whether checkpoints are written by something else than `save_pretrained` of the whole model."""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled or hasattr(self.model, "peft_config")

    def _load_shards(self, folder: str) -> bool:
        """Loads a sharded checkpoint, False if it is none.

        The parent takes one file after the other, but a fused weight may need tensors of two (the experts of a
        Qwen3-MoE layer), and compares names on disk with those in memory.
        """
        index = Path(folder, SAFE_WEIGHTS_INDEX_NAME)
        if self._has_own_format() or not index.is_file():
            return False
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        weights = {name: tensor for file in files for name, tensor in load_file(index.parent / file).items()}
        self._issue_warnings_after_load(self.model.load_state_dict(weights, strict=False))
        return True

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuses a checkpoint that does not restore every weight; the parent would go on with the wrong ones."""
        tied = set(getattr(self.accelerator.unwrap_model(self.model), "all_tied_weights_keys", None) or ())
        missing = [key for key in load_result.missing_keys if key not in tied]
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"the checkpoint does not fit the model: missing {missing[:5]} ({len(missing)} in all), unexpected "
                f"{load_result.unexpected_keys[:5]} ({len(load_result.unexpected_keys)} in all)"
            )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As the parent's, with the image processor, and beside adapters the configuration they were trained with."""
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = os.fspath(output_dir or self.args.output_dir)
        if self.image_processor is not None:
            self.image_processor.save_pretrained(folder)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if hasattr(model, "peft_config"):
            model.get_base_model().config.save_pretrained(folder)
