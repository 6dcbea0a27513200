"""What decides the memory of a training run: size of a batch, precision, what is trained, who shares it.

Names are those of `arguments.py`. A plain value object: nothing is measured here, see `memory_model.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .arguments import QUANTIZATIONS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MIXED = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}
ATTENTION = (None, "sdpa", "eager", "flash_attention_2")
SHARDING = ("none", "ddp", "zero1", "zero2", "zero3", "fsdp")
DEEPSPEED = ("zero1", "zero2", "zero3")
REFERENCES = (None, "copy", "checkpoint")
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "sgd", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")


@dataclass(frozen=True)
class RunSettings:
    """What decides the memory of a training run; names as in `InternVLTrainingArguments` and `ModelArguments`.

    Args:
        tokens: Tokens of a row, visual ones included; of the pack with `packing`; of each answer's sequence with
            `pairs`.
        tiles: Tiles of a row, or of the pack; 0 for text alone (a dummy tile is encoded then, as in training).
        per_device_train_batch_size: Rows of a micro-batch.
        packing: The row is a pack: under sdpa its attention needs a mask.
        pairs: Rows are pairs of answers, as `MPOTrainer` trains on: two sequences about the tiles of one row.
        reference: Of pairs, the model in memory that answers are compared with: `copy`, which shares what is not
            trained, unless DeepSpeed or FSDP wrap it; `checkpoint`, another one; None where there is none (adapters
            that are switched off, precomputed values).
        supervised: Tokens of a row that have a label; None for all that are not visual.
        dtype: Of the weights in memory, float32 or bfloat16.
        mixed_precision: `bf16` or `fp16`, as `TrainingArguments.bf16` and `.fp16` switch them on; None for neither.
        gradient_checkpointing: Keep only the inputs of layers and compute the rest again.
        gradient_accumulation_steps: Above 1, gradients are there during the whole step.
        attn_implementation: sdpa, eager or flash_attention_2; None for the model's own choice.
        quantization: nf4 or int8 for the frozen language model.
        optim: A name of `TrainingArguments.optim`, one of `OPTIMIZERS`.
        devices: Data-parallel devices.
        sharding: One of `SHARDING`; None for ddp on several devices. zero1 to zero3 are DeepSpeed's stages, fsdp is
            FullyShardedDataParallel 2 through accelerate.
        freeze_backbone, freeze_llm, freeze_mlp, unfreeze_vit_layers, unfreeze_lm_head, use_backbone_lora,
            use_llm_lora, use_mlp_lora, lora_alpha, lora_dropout: As in `InternVLTrainingArguments`.

    Raises:
        ValueError: an unknown name, a number out of range, or a combination that cannot run.
    """

    tokens: int = 4096
    tiles: int = 7
    per_device_train_batch_size: int = 1
    packing: bool = False
    pairs: bool = False
    reference: str | None = None
    supervised: int | None = None
    dtype: str = "bfloat16"
    mixed_precision: str | None = "bf16"
    gradient_checkpointing: bool = True
    gradient_accumulation_steps: int = 1
    attn_implementation: str | None = None
    quantization: str | None = None
    optim: str = "adamw_torch_fused"
    devices: int = 1
    sharding: str | None = None
    freeze_backbone: bool = False
    freeze_llm: bool = False
    freeze_mlp: bool = False
    unfreeze_vit_layers: int | None = None
    unfreeze_lm_head: bool = False
    use_backbone_lora: int = 0
    use_llm_lora: int = 0
    use_mlp_lora: int = 0
    lora_alpha: float | None = None
    lora_dropout: float = 0.05

    def __post_init__(self) -> None:
        choices: dict[str, Iterable[str | None]] = {
            "dtype": DTYPES, "mixed_precision": MIXED, "attn_implementation": ATTENTION, "optim": OPTIMIZERS,
            "sharding": (None, *SHARDING), "quantization": (None, *QUANTIZATIONS), "reference": REFERENCES,
        }  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {getattr(self, name)!r}")
        least = {
            "tokens": 2, "tiles": 0, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "devices": 1,
        }  # fmt: skip
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be at least {bound}, got {getattr(self, name)}")
        self._check_together()

    def _check_together(self) -> None:
        if self.supervised is not None and not 1 <= self.supervised < self.tokens:
            raise ValueError(f"supervised must be 1 to tokens - 1 = {self.tokens - 1}, got {self.supervised}")
        if self.packing and self.per_device_train_batch_size != 1:
            raise ValueError("packing makes a batch of one pack: leave per_device_train_batch_size at 1")
        if self.devices > 1 and self.sharding == "none":
            raise ValueError(f"devices={self.devices} with sharding='none': choose ddp, zero1 to zero3 or fsdp")
        if self.quantization is not None and self.shards_weights:
            raise ValueError(
                f"quantization={self.quantization!r} with sharding={self.sharding!r}: quantized weights are not "
                "sharded; use ddp, zero1 or zero2"
            )
        if self.reference is not None and not self.pairs:
            raise ValueError(f"reference={self.reference!r} without pairs: nothing is compared with it")
        if self.reference is not None and self.quantization is not None:
            raise ValueError(
                f"reference={self.reference!r} with quantization={self.quantization!r} is not modelled: adapters need "
                "no reference model, leave it at None"
            )
        if "8bit" in self.optim and self.sharded:
            raise ValueError(f"optim={self.optim!r} with sharding={self.sharding!r} is not modelled: use adamw_torch")

    @property
    def kind(self) -> str:
        """How devices share the work; never None."""
        return self.sharding or ("ddp" if self.devices > 1 else "none")

    @property
    def sharded(self) -> bool:
        """Whether anything is divided among the devices."""
        return self.kind not in ("none", "ddp")

    @property
    def shards_weights(self) -> bool:
        """Whether the weights are."""
        return self.kind in ("zero3", "fsdp")

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients are there during the whole step; ZeRO 3 has a buffer for its share of them."""
        return self.gradient_accumulation_steps > 1 or self.kind == "zero3"

    @property
    def padded(self) -> bool:
        """Whether attention needs a mask beyond the causal one."""
        return self.packing or self.sequences > 1

    @property
    def rows(self) -> int:
        """Rows of a micro-batch, or pairs."""
        return self.per_device_train_batch_size

    @property
    def sequences(self) -> int:
        """Sequences of a micro-batch: one pack, or both answers of every pair."""
        return self.rows * (2 if self.pairs and not self.packing else 1)

    @property
    def places(self) -> int:
        """Tiles of a sequence: in a pack of pairs every tile stands twice."""
        return self.tiles * (2 if self.pairs and self.packing else 1)
