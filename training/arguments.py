"""Settings of a training run: which weights (`ModelArguments`), which data (`DataArguments`), how to train.

Fields keep the names of the original's scripts (`internvl/train/internvl_chat_finetune.py`) where those have them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from ..data.frame_sampling import frames_per_second
from ..losses_internvl import LOSS_REDUCTIONS

QUANTIZATIONS = ("nf4", "int8")


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def _list_setting(help: str) -> Any:
    return field(default_factory=list, metadata={"help": help})


@dataclass
class ModelArguments:
    """Where weights, tokenizer and configuration come from.

    Exactly one of `model_name_or_path` (a checkpoint), `llm_path` (with `vision_path` or a `config` that describes
    the encoder: progressive scaling, fresh projector) and `config` alone (fresh weights everywhere) says what the
    model is. The other fields override the checkpoint's configuration; None keeps its value.
    """

    model_name_or_path: str | None = _setting(None, "Checkpoint: folder or Hub repository, any InternVL layout.")
    vision_path: str | None = _setting(None, "Vision encoder, from an InternViT or a chat checkpoint.")
    llm_path: str | None = _setting(None, "Language model: any causal LM, or a chat checkpoint's.")
    mlp_path: str | None = _setting(None, "Projector weights: a chat checkpoint, or a file with mlp1 weights.")
    config: dict[str, Any] | None = field(default=None, metadata={"help": "InternVLChatConfig fields, from nothing."})
    tokenizer_path: str | None = _setting(None, "Tokenizer; None for that of the checkpoint or the language model.")
    conv_style: str | None = _setting(None, "Chat template; None for the checkpoint's.")
    force_image_size: int | None = _setting(None, "Tile side in pixels; position embeddings are resized.")
    down_sample_ratio: float | None = _setting(None, "Pixel shuffle ratio.")
    vision_select_layer: int | None = _setting(None, "Encoder layer whose output is used.")
    ps_version: str | None = _setting(None, "Pixel shuffle version, v1 or v2.")
    drop_path_rate: float | None = _setting(None, "Stochastic depth of the vision encoder.")
    dynamic_image_size: bool | None = _setting(None, "Cut images into tiles.")
    use_thumbnail: bool | None = _setting(None, "Add a thumbnail to several tiles.")
    min_dynamic_patch: int | None = _setting(None, "Fewest tiles of an image.")
    max_dynamic_patch: int | None = _setting(None, "Most tiles of an image.")
    attn_implementation: str | None = _setting(None, "sdpa, eager, flash_attention_2, flex_attention.")
    dtype: str = _setting("auto", "Of the weights in memory: auto, float32, bfloat16, float16.")
    quantization: str | None = _setting(None, "nf4 or int8 (bitsandbytes) for the frozen language model: QLoRA.")

    def __post_init__(self) -> None:
        ways = [self.model_name_or_path is not None, self.llm_path is not None]
        if sum(ways) > 1:
            raise ValueError(
                "model_name_or_path and llm_path exclude one another: a checkpoint has its language model"
            )
        if not any(ways) and self.config is None:
            raise ValueError("nothing says what the model is: set model_name_or_path, llm_path or config")
        if self.llm_path is not None and self.vision_path is None and self.config is None:
            raise ValueError("llm_path needs vision_path, or a config with the vision encoder's fields")
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise ValueError(f"quantization must be one of {QUANTIZATIONS} or None, got {self.quantization!r}")


@dataclass
class DataArguments:
    """Which rows to train on, and their limits.

    Data sets are named either by `meta_path` (the original's meta json) or by `data_paths` with `image_folders` and
    `repeat_times` of the same length (the form of XTuner's configurations).
    """

    meta_path: str | None = _setting(None, "Meta json: one entry per data set.")
    data_paths: list[str] = _list_setting("Annotation files, .jsonl or .json.")
    image_folders: list[str | None] = _list_setting("Folder of the images of each file; null for text.")
    repeat_times: list[float] = _list_setting("How often each file is seen per epoch; a fraction is a random subset.")
    eval_meta_path: str | None = _setting(None, "Meta json of the evaluation data.")
    eval_data_paths: list[str] = _list_setting("Annotation files to evaluate on.")
    eval_image_folders: list[str | None] = _list_setting("Their image folders.")
    data_augment: bool = _setting(False, "JPEG augmentation for data sets that do not say (list form).")
    exif: bool = _setting(True, "Turn images upright by EXIF, for data sets that do not say.")
    min_num_frame: int = _setting(8, "Fewest frames of a video.")
    max_num_frame: int = _setting(32, "Most frames of a video.")
    frame_sampling: str = _setting("rand", "Video frames: rand, middle or fpsX (X frames a second).")
    max_skip_share: float = _setting(0.01, "Share of unusable rows of a data set past which the run stops.")
    index_cache: str | None = _setting(None, "Folder of the length index; None for one beside the Hugging Face cache.")
    index_workers: int = _setting(0, "Processes that make the length index; 0 for this one.")

    def __post_init__(self) -> None:
        for prefix in ("", "eval_"):
            meta, paths = getattr(self, f"{prefix}meta_path"), getattr(self, f"{prefix}data_paths")
            folders = getattr(self, f"{prefix}image_folders")
            if meta is not None and paths:
                raise ValueError(f"{prefix}meta_path and {prefix}data_paths exclude one another")
            if folders and len(folders) != len(paths):
                raise ValueError(f"{prefix}image_folders has {len(folders)} entries for {len(paths)} data paths")
        if self.repeat_times and len(self.repeat_times) != len(self.data_paths):
            raise ValueError(
                f"repeat_times has {len(self.repeat_times)} entries for {len(self.data_paths)} data paths"
            )
        if not 0 <= self.max_skip_share <= 1:
            raise ValueError(f"max_skip_share must be a share between 0 and 1, got {self.max_skip_share}")
        if not 1 <= self.min_num_frame <= self.max_num_frame:
            raise ValueError(
                f"need 1 <= min_num_frame <= max_num_frame, got {self.min_num_frame}, {self.max_num_frame}"
            )
        try:
            frames_per_second(self.frame_sampling)
        except ValueError:
            raise ValueError(
                "frame_sampling must be rand, middle or fpsX (X frames a second, such as fps1 or fps0.5), got "
                f"{self.frame_sampling!r}"
            ) from None


@dataclass
class InternVLTrainingArguments(TrainingArguments):
    """Arguments of `InternVLTrainer`.

    Defaults that differ from the parent class: `remove_unused_columns=False` (the collator needs every column) and,
    from the original's recipes, `weight_decay=0.05`, `warmup_steps=0.03` (below 1: a share of all steps) and a cosine
    schedule.

    Args:
        loss_reduction: Weight of a label in a sample with x labels: `"token"` 1, `"sample"` 1/x, `"square"` x**-0.5
            (InternVL 2.5, arXiv 2412.05271).
        max_seq_length: Most tokens of a row, visual ones included; None for no limit.
        packing: Put several rows into one sequence, up to `max_packed_tokens` tokens and `num_images_expected` tiles;
            `per_device_train_batch_size` must be 1 then, a batch is a pack.
        freeze_backbone: Do not train the vision encoder. This and the next two are ignored for a part whose LoRA rank
            is set: LoRA freezes the part's own weights and trains its adapters.
        freeze_llm: Do not train the language model.
        freeze_mlp: Do not train the projector.
        unfreeze_vit_layers: With `freeze_backbone`, train the encoder's layers from this one on; -8: the last eight.
            None or 0: no layer, as in the original.
        unfreeze_lm_head: With `freeze_llm` or `use_llm_lora`, train the output head.
        use_backbone_lora: Rank of LoRA on the vision encoder, 0 for none.
        use_llm_lora: Rank of LoRA on the language model, 0 for none.
        use_mlp_lora: Rank of LoRA on the projector, 0 for none.
        lora_alpha: LoRA's alpha; None for twice the rank, as in the original.
        lora_dropout: LoRA's dropout.
        eval_generations: Evaluation rows whose last answer is generated and compared at every evaluation, 0 for none;
            logged as `eval_exact_match` and, where there are boxes, `eval_box_iou`.
        eval_max_new_tokens: Most tokens of such an answer.
        vision_lr: Learning rate of the vision encoder; None for `learning_rate`.
        mlp_lr: Learning rate of the projector; None for `learning_rate`.

    Raises:
        ValueError: a value that would make the loss inexact, or an unknown reduction.
    """

    loss_reduction: str = _setting("square", "Label weights: token, sample or square.")
    max_seq_length: int | None = _setting(None, "Most tokens of a row.")
    packing: bool = _setting(False, "Put several rows into one sequence.")
    max_packed_tokens: int = _setting(16384, "Most tokens of a pack.")
    num_images_expected: int = _setting(48, "Most tiles of a pack.")
    freeze_backbone: bool = _setting(False, "Do not train the vision encoder; ignored with use_backbone_lora.")
    freeze_llm: bool = _setting(False, "Do not train the language model; ignored with use_llm_lora.")
    freeze_mlp: bool = _setting(False, "Do not train the projector; ignored with use_mlp_lora.")
    unfreeze_vit_layers: int | None = _setting(
        None, "Train a frozen encoder's layers from this one on; -8: the last 8; 0: none."
    )
    unfreeze_lm_head: bool = _setting(False, "Train the output head of a frozen language model.")
    use_backbone_lora: int = _setting(0, "Rank of LoRA on the vision encoder, 0 for none.")
    use_llm_lora: int = _setting(0, "Rank of LoRA on the language model, 0 for none.")
    use_mlp_lora: int = _setting(0, "Rank of LoRA on the projector, 0 for none.")
    lora_alpha: float | None = _setting(None, "LoRA's alpha; None for twice the rank.")
    lora_dropout: float = _setting(0.05, "LoRA's dropout.")
    eval_generations: int = _setting(0, "Evaluation rows to answer at every evaluation, 0 for none.")
    eval_max_new_tokens: int = _setting(128, "Most tokens of such an answer.")
    vision_lr: float | None = _setting(None, "Learning rate of the vision encoder.")
    mlp_lr: float | None = _setting(None, "Learning rate of the projector.")
    remove_unused_columns: bool = _setting(False, "Must stay off: rows are not columns.")
    weight_decay: float = _setting(0.05, "Weight decay.")
    warmup_steps: float = _setting(0.03, "Warm-up steps, or their share if below 1.")
    lr_scheduler_type: str = _setting("cosine", "Learning rate schedule.")

    @property
    def longest_row(self) -> int | None:
        """Most tokens of a row: `max_seq_length`, and with packing what a pack holds; None for no limit."""
        limits = [self.max_seq_length, self.max_packed_tokens if self.packing else None]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def groups_by_length(self) -> bool:
        """Whether batches hold rows of like length."""
        return self.train_sampling_strategy == "group_by_length"

    @property
    def needs_lengths(self) -> bool:
        """Whether rows must be measured before an epoch can be planned."""
        return self.packing or self.groups_by_length

    @property
    def device(self) -> torch.device:
        """As in the base class, with no index on a CPU: before 5.18 transformers resumes ranks on "cpu:0", which torch
        does not know."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    def __post_init__(self) -> None:
        if os.environ.get("WORLD_SIZE", "1") == "1":  # a recipe for several processes runs on one too
            self.ddp_backend = None
        super().__post_init__()
        if self.ddp_find_unused_parameters is None:  # every step uses all: text alone runs a black tile through
            self.ddp_find_unused_parameters = False
        if self.loss_reduction not in LOSS_REDUCTIONS:
            raise ValueError(f"loss_reduction must be one of {LOSS_REDUCTIONS}, got {self.loss_reduction!r}")
        if not self.average_tokens_across_devices:
            raise ValueError(
                "average_tokens_across_devices=False would average over ranks instead of labels; leave it at True"
            )
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor is not supported: the model computes its own weighted loss")
        if self.restore_callback_states_from_checkpoint:
            raise ValueError(
                "restore_callback_states_from_checkpoint=True would replace the trainer's own callbacks, which take "
                "up their state by themselves; leave it at False"
            )
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would drop what the collator needs; leave it at False")
        if self.packing and self.per_device_train_batch_size != 1:
            raise ValueError(
                f"packing makes a batch of one pack, but per_device_train_batch_size="
                f"{self.per_device_train_batch_size}; set it to 1 and size the pack with max_packed_tokens"
            )
