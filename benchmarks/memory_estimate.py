"""The memory estimate of training steps against what real ones take.

Every case is a small model of the shape of InternVL, trained for real on the CPU by the code that the estimate runs on
fake tensors; of nine layers or so the estimate runs three. Two measures of the step (the second one, when optimiser
states exist), both above nothing, weights and states included, neither of which shares code with the estimate:

- MemTracker: PyTorch's own account of tensors (`torch.distributed._tools.mem_tracker`);
- allocator: the running sum of every allocation that the profiler records, also inside kernels.

Goal: within 20 %. The last cases are several devices: DistributedDataParallel over gloo in one process, and
FullyShardedDataParallel 2 on four ranks of which one runs (`fake` process group), each on its own in a process;
MemTracker does not follow their buffers, the allocator does. DeepSpeed is not measured here, nor is a GPU.

    python benchmarks/memory_estimate.py
"""

import argparse
import contextlib
import copy
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._tools.mem_tracker import MemTracker

try:
    from internvl_hub.configuration_internvl_chat import InternVLChatConfig
    from internvl_hub.modeling_internvl_chat import InternVLChatModel
    from internvl_hub.training.estimate import estimate
    from internvl_hub.training.memory_settings import RunSettings
    from internvl_hub.training.preference_arguments import PreferenceArguments
    from internvl_hub.training.preference_batch import PairBatch
    from internvl_hub.training.preference_collation import PreferenceCollator
    from internvl_hub.training.preference_terms import PairTerms
    from internvl_hub.training.reference import frozen_copy
    from internvl_hub.training.tuning import prepare_for_tuning
except ImportError:
    sys.exit(f"internvl_hub is not installed: run `pip install -e {Path(__file__).resolve().parents[1]}` first")

MIB, RANKS, CONTEXT = 2**20, 4, 7
GOAL = 0.2
LORA = {"freeze_backbone": True, "freeze_llm": True, "freeze_mlp": True, "use_llm_lora": 8}
CHECKPOINTING, MIXED, PACK = {"gradient_checkpointing": True}, {"mixed_precision": "bf16"}, {"packing": True}
PAIRS = {"pairs": True, "reference": "copy"}
LARGE_VOCABULARY = {"vocab_size": 80_000}  # one chunk of the loss is then 419 rows
DEFAULTS = {"tokens": 256, "tiles": 4, "dtype": "float32", "mixed_precision": None, "gradient_checkpointing": False}
# Name -> changes of the configuration, changes of the settings.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "everything": ({}, {}),
    "everything, checkpointing": ({}, CHECKPOINTING),
    "bfloat16 weights": ({}, {"dtype": "bfloat16", **CHECKPOINTING}),
    "mixed precision": ({}, MIXED),
    "mixed precision, checkpointing": ({}, {**MIXED, **CHECKPOINTING}),
    "accumulated gradients": ({}, {**CHECKPOINTING, "gradient_accumulation_steps": 8}),
    "encoder frozen": ({}, {"freeze_backbone": True}),
    "last 4 encoder layers": ({}, {"freeze_backbone": True, "unfreeze_vit_layers": -4}),
    "projector alone": ({}, {"freeze_backbone": True, "freeze_llm": True, **CHECKPOINTING}),
    "LoRA": ({}, LORA),
    "LoRA, checkpointing": ({}, {**LORA, **CHECKPOINTING}),
    "LoRA, mixed precision": ({}, {**LORA, **MIXED, "dtype": "bfloat16"}),
    "text alone": ({}, {"tiles": 0}),
    "16 tiles": ({}, {"tiles": 16, "tokens": 512}),
    "2048 tokens": ({}, {"tokens": 2048, **CHECKPOINTING}),
    "three padded rows": ({}, {"per_device_train_batch_size": 3}),
    "pack": ({}, {**PACK, "tokens": 1024}),
    "pack, checkpointing": ({}, {**PACK, **CHECKPOINTING, "tokens": 1024}),
    "pack, mixed precision, LoRA": ({}, {**PACK, **MIXED, **LORA, "tokens": 1024}),
    "loss in chunks": (LARGE_VOCABULARY, {"tokens": 640}),
    "loss in chunks, mixed precision": (LARGE_VOCABULARY, {"tokens": 640, **MIXED, **CHECKPOINTING}),
    "a tenth of the tokens with a label": (LARGE_VOCABULARY, {"tokens": 640, "supervised": 64}),
    "eager attention": ({}, {"attn_implementation": "eager"}),
    "6B encoder's kind, qwen3": ({"llm": "qwen3", "vision": {"norm_type": "rms_norm", "qk_normalization": True}}, {}),
    "experts": ({"llm": "qwen3_moe"}, {"dtype": "bfloat16", **CHECKPOINTING}),
    "select_layer -4": ({"select_layer": -4}, {}),
    "pairs": ({}, PAIRS),
    "pairs, checkpointing": ({}, {**PAIRS, **CHECKPOINTING}),
    "pairs, mixed precision, encoder frozen": ({}, {**PAIRS, **MIXED, **CHECKPOINTING, "freeze_backbone": True}),
    "pairs, precomputed reference": ({}, {"pairs": True, **CHECKPOINTING}),
    "two pairs, loss in chunks": (LARGE_VOCABULARY, {**PAIRS, "tokens": 512, "per_device_train_batch_size": 2}),
}
SHARED: dict[str, tuple[str, dict[str, Any]]] = {
    "DDP": ("ddp", {}),
    "DDP, encoder frozen, checkpointing": ("ddp", {"freeze_backbone": True, **CHECKPOINTING}),
    "FSDP, mixed precision": ("fsdp", MIXED),
    "FSDP, mixed precision, checkpointing": ("fsdp", {**MIXED, **CHECKPOINTING}),
    "FSDP, encoder frozen": ("fsdp", {**MIXED, "freeze_backbone": True}),
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "head_dim": 32}


class Tracker(MemTracker):
    """PyTorch's tracker, which would hook frozen parameters and fail."""

    def _track_module_params_and_buffers(self, module: Any, install_grad_hooks: bool = True) -> Any:
        trained = all(parameter.requires_grad for parameter in module.parameters())
        return super()._track_module_params_and_buffers(module, install_grad_hooks and trained)


def make_config(
    llm: str = "qwen2", vision: dict[str, Any] | None = None, select_layer: int = -1, vocab_size: int = 4000
) -> InternVLChatConfig:
    """About 4M parameters; tiles of 112 pixels, 16 visual tokens each."""
    encoder = {
        "hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 4, "num_hidden_layers": 8,
        "image_size": 112, "patch_size": 14, "norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False,
        "drop_path_rate": 0.1, **(vision or {}),
    }  # fmt: skip
    language = {
        "model_type": llm, "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 8,
        "num_key_value_heads": 2, "num_hidden_layers": 10, "vocab_size": vocab_size,
        **(_EXPERTS if llm.endswith("_moe") else {}),
    }  # fmt: skip
    return InternVLChatConfig(
        vision_config=encoder, llm_config=language, select_layer=select_layer, force_image_size=112,
        ps_version="v2", img_context_token_id=CONTEXT,
    )  # fmt: skip


def make_batch(config: InternVLChatConfig, settings: RunSettings) -> dict[str, Any]:
    """Random rows, of several the last one padded; or a pack of two rows, the second twice as long as the first."""
    rows, visual, length = settings.rows, sum(config.tokens_per_tile(settings.tiles)), settings.tokens
    ids = torch.randint(10, config.llm_config.vocab_size, (rows, length))
    ids[:, :visual] = CONTEXT
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[:, : length - (settings.supervised or length - visual)] = -100
    if rows > 1:
        mask[-1, -3:], labels[-1, -3:] = 0, -100
    tiles = max(rows * settings.tiles, 1)
    batch: dict[str, Any] = {
        "input_ids": ids, "labels": labels, "attention_mask": mask, "loss_weight": torch.ones(ids.shape),
        "pixel_values": torch.randn(tiles, 3, config.image_size, config.image_size),
        "image_flags": torch.full((tiles,), int(settings.tiles > 0)),
    }  # fmt: skip
    if settings.packing:
        first = length // 3
        del batch["attention_mask"]
        batch["position_ids"] = torch.cat([torch.arange(first), torch.arange(length - first)]).unsqueeze(0)
        batch["use_cache"] = False
    return batch


def make_pairs(config: InternVLChatConfig, settings: RunSettings) -> dict[str, Any]:
    """Random pairs; the rejected answer is shorter by a token."""
    visual, pairs = sum(config.tokens_per_tile(settings.tiles)), []
    for _ in range(settings.rows):
        ids = torch.randint(10, config.llm_config.vocab_size, (settings.tokens,))
        ids[:visual] = CONTEXT
        labels = ids.clone()
        labels[: settings.tokens - (settings.supervised or settings.tokens - visual)] = -100
        pairs.append({
            "chosen_input_ids": ids, "chosen_labels": labels, "rejected_input_ids": ids[:-1],
            "rejected_labels": labels[:-1],
            "pixel_values": torch.randn(settings.tiles, 3, config.image_size, config.image_size),
        })  # fmt: skip
    batch = PreferenceCollator(0, config.image_size, "token")(pairs)
    return {name: value for name, value in batch.items() if not name.startswith("num_")}


def pairs_loss(model: Any, reference: Any, batch: dict[str, Any]) -> torch.Tensor:
    """As `MPOTrainer` computes it; a reference of None is one of values from the disk."""
    pairs = PairBatch.of(batch)
    values = torch.zeros(2 * pairs.pairs)
    if reference is not None:
        with torch.no_grad():
            values = pairs.score(reference).answers
    terms = PairTerms.of(pairs, pairs.score(model), values, 0.0, PreferenceArguments())
    return terms.loss(PreferenceArguments(), pairs.pairs, terms.weight)


class Step:
    """A model, its optimiser and a batch; calling it runs forward, backward and update."""

    def __init__(self, config: InternVLChatConfig, settings: RunSettings) -> None:
        torch.manual_seed(0)
        self.settings = settings
        options = {"dtype": getattr(torch, settings.dtype), "attn_implementation": settings.attn_implementation}
        model = InternVLChatModel._from_config(copy.deepcopy(config), **options)
        self.model: Any = prepare_for_tuning(model, settings).train()  # type: ignore[arg-type]
        if settings.gradient_checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        self.buckets = 0
        if settings.kind == "ddp":
            self.model = torch.nn.parallel.DistributedDataParallel(self.model)
            self.buckets = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        elif settings.kind == "fsdp":
            self._shard(model)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, fused=settings.kind != "fsdp", foreach=False)
        self.reference = frozen_copy(self.model) if settings.reference == "copy" else None
        self.batch = make_pairs(config, settings) if settings.pairs else make_batch(config, settings)
        self.tensors = [value for value in self.batch.values() if isinstance(value, torch.Tensor)]

    def _shard(self, model: Any) -> None:
        """As accelerate does: every layer is a unit, all the rest another; 16 bits to compute."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
        options: dict[str, Any] = {"mesh": dist.init_device_mesh("cpu", (RANKS,)), "mp_policy": policy}
        for layer in (*model.vision_model.encoder.layers, *model.language_model.get_decoder().layers):
            fully_shard(layer, **options)
        fully_shard(self.model, **options)

    def __call__(self) -> None:
        autocast = torch.autocast("cpu", torch.bfloat16) if self.settings.mixed_precision else contextlib.nullcontext()
        with autocast:
            loss = (
                pairs_loss(self.model, self.reference, self.batch)
                if self.settings.pairs
                else self.model(**self.batch, num_items_in_batch=torch.ones(())).loss
            )
        loss.backward()
        self.optimizer.step()

    def reset(self) -> None:
        """What a trainer does between steps; within an accumulation, gradients stay."""
        self.optimizer.zero_grad(set_to_none=self.settings.gradient_accumulation_steps == 1)

    def copied(self) -> list[torch.Tensor]:
        """The reference's own tensors."""
        shared = {id(parameter) for parameter in self.model.parameters()}
        tensors = () if self.reference is None else (*self.reference.parameters(), *self.reference.buffers())
        return [tensor for tensor in tensors if id(tensor) not in shared]

    def held(self) -> int:
        """Bytes that are there before a step: weights, buffers, states, gradients, batch, buckets."""
        states = (value for state in self.optimizer.state.values() for value in state.values())
        gradients = (parameter.grad for parameter in self.trained if parameter.grad is not None)
        tensors = (*self.model.parameters(), *self.model.buffers(), *states, *gradients, *self.tensors, *self.copied())
        local = (getattr(tensor, "_local_tensor", tensor) for tensor in tensors)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}
        return sum(storages.values()) + self.buckets


def allocator_peak(step: Step) -> int:
    """Highest sum of what was held before and what the step allocated less what it freed."""
    held = step.held()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return held + highest


def tracker_peak(step: Step) -> int:
    tracker = Tracker()
    tracker.track_external(step.model, step.optimizer, *step.tensors, *step.copied())
    with tracker:
        step()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def measure(name: str) -> tuple[float | None, float]:
    """Runs one case and prints its line; returns estimate / MemTracker and estimate / allocator."""
    if name in CASES:
        shape, changes = CASES[name]
        config, settings = make_config(**shape), RunSettings(**{**DEFAULTS, **changes})
    else:
        kind, changes = SHARED[name]
        config = make_config()
        settings = RunSettings(**{**DEFAULTS, **changes, "sharding": kind, "devices": RANKS})
        start_group(kind)
    expected = estimate(config, settings, cuda=False).peak
    step = Step(config, settings)
    for _ in range(3 if name in SHARED else 1):  # states appear in the first step, DDP's last buckets in the second
        step()
        step.reset()
    allocated = allocator_peak(step)
    step.reset()
    tracked = tracker_peak(step) if name in CASES else None
    ratios = (None if tracked is None else expected / tracked, expected / allocated)
    tracker_cell = f"{'-':>12}" if ratios[0] is None else f"{ratios[0]:12.3f}"
    print(f"{name:38}{expected / MIB:9.1f} MiB{tracker_cell}{ratios[1]:11.3f}", flush=True)
    return ratios


def start_group(kind: str) -> None:
    if kind == "ddp":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    else:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)


def measure_apart(name: str) -> tuple[None, float]:
    """As `measure`, in a process of its own: a process group lasts as long as its process."""
    command = [sys.executable, "-W", "ignore", __file__, "--case", name]
    line = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
    print(line, flush=True)
    return None, float(line.split()[-1])


def summarise(name: str, column: Sequence[float | None]) -> str:
    ratios = [ratio for ratio in column if ratio is not None]
    missed = sum(abs(ratio - 1) > GOAL for ratio in ratios)
    return f"{name}: {min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} cases, {missed} beyond the goal"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=(*CASES, *SHARED), help="one case, in this process")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.case is not None:
        measure(args.case)
        return
    print(f"estimate / measured, goal 1 +- {GOAL}; torch {torch.__version__}, CPU")
    print(f"{'':38}{'estimate':>13}{'MemTracker':>12}{'allocator':>11}")
    rows = [*map(measure, CASES), *map(measure_apart, SHARED)]
    for name, column in zip(("MemTracker", "allocator"), zip(*rows, strict=True), strict=True):
        print(summarise(name, column))


if __name__ == "__main__":
    main()
