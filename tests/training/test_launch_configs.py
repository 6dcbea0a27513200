"""The accelerate and DeepSpeed files: read by accelerate's own launcher and plugins, filled by transformers' own code.

DeepSpeed itself is not installed here; its keys are compared with a list.
"""

from __future__ import annotations

import json
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from internvl_hub.modeling_intern_vit import InternVisionEncoderLayer
from internvl_hub.tests.training import tiny_models as tiny
from internvl_hub.training.recipes import RECIPES, load_recipe

_ACCELERATE = sorted(path.stem for path in (RECIPES / "accelerate").glob("*.yaml"))
_DEEPSPEED = sorted(path.stem for path in (RECIPES / "deepspeed").glob("*.json"))
# https://www.deepspeed.ai/docs/config-json/ and deepspeed/runtime/zero/{config,offload_config}.py: what is used here.
_KEYS = {
    "": {
        "bf16", "fp16", "gradient_accumulation_steps", "gradient_clipping", "steps_per_print", "train_batch_size",
        "train_micro_batch_size_per_gpu", "wall_clock_breakdown", "zero_optimization",
    },
    "bf16": {"enabled"},
    "fp16": {"enabled"},
    "zero_optimization": {
        "stage", "contiguous_gradients", "overlap_comm", "reduce_bucket_size", "allgather_partitions",
        "allgather_bucket_size", "reduce_scatter", "sub_group_size", "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance",
        "stage3_gather_16bit_weights_on_model_save", "offload_param", "offload_optimizer",
    },
    "offload_param": {"device", "pin_memory"},
    "offload_optimizer": {"device", "pin_memory"},
}  # fmt: skip
_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}


def _launch(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Arguments of `accelerate launch --config_file NAME`, just before it would start processes."""
    monkeypatch.chdir(RECIPES.parent)
    started = []
    for launcher in ("deepspeed_launcher", "multi_gpu_launcher"):
        monkeypatch.setattr(f"accelerate.commands.launch.{launcher}", started.append)
    command = ["--config_file", f"recipes/accelerate/{name}.yaml", "-m", "internvl_hub.training.run", "tiny/lora"]
    launch_command(launch_command_parser().parse_args(command))
    (args,) = started
    return args


def test_the_files_are_those_of_the_documentation() -> None:
    assert _ACCELERATE == ["ddp", "fsdp2", *_STAGES]
    assert _DEEPSPEED == sorted(_STAGES)


@pytest.mark.parametrize("name", _ACCELERATE)
def test_accelerate_reads_the_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config_from_file(str(RECIPES / "accelerate" / f"{name}.yaml"))  # refuses unknown keys
    kinds = {"ddp": DistributedType.MULTI_GPU, "fsdp2": DistributedType.FSDP}
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == kinds.get(name, DistributedType.DEEPSPEED)
    assert config.mixed_precision is None  # the recipe's
    assert (config.num_machines, config.num_processes) == (1, 8)
    args = _launch(name, monkeypatch)
    assert (args.multi_gpu, args.use_fsdp, args.use_deepspeed) == (name == "ddp", name == "fsdp2", name in _STAGES)
    assert args.mixed_precision == "no" and args.module and args.training_script_args == ["tiny/lora"]


def test_every_nested_key_is_an_option_of_the_launcher() -> None:
    """The launcher takes nested keys as they come; a misspelt one would have no effect."""
    known = {action.dest for action in launch_command_parser()._actions}
    for name in _ACCELERATE:
        config = load_config_from_file(str(RECIPES / "accelerate" / f"{name}.yaml"))
        for section in (config.fsdp_config, config.deepspeed_config):
            assert set(section) <= known, name


# ---------------------------------------------------------------------------------------------------------------- FSDP


def _fsdp_plugin(monkeypatch: pytest.MonkeyPatch) -> FullyShardedDataParallelPlugin:
    args = _launch("fsdp2", monkeypatch)
    for key, value in prepare_multi_gpu_env(args).items():
        if key.startswith("FSDP_"):
            monkeypatch.setenv(key, value)
    return FullyShardedDataParallelPlugin()


def test_fsdp_plugin_of_the_launched_process(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = _fsdp_plugin(monkeypatch)
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.cpu_ram_efficient_loading is True
    assert not isinstance(plugin.cpu_offload, CPUOffloadPolicy) and not plugin.activation_checkpointing
    assert plugin.mixed_precision_policy is None  # set by the Trainer


@pytest.mark.parametrize("kind", ["qwen2", "internlm2"])
def test_fsdp_wraps_the_layers_of_both_towers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model(kind)
    wraps = fsdp2_prepare_auto_wrap_policy(_fsdp_plugin(monkeypatch), model)
    wrapped = {name for name, module in model.named_modules() if wraps(module)}
    layers = {name for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)}
    assert wrapped == layers and len(wrapped) == 4
    assert sum(isinstance(model.get_submodule(name), InternVisionEncoderLayer) for name in wrapped) == 2


# ----------------------------------------------------------------------------------------------------------- DeepSpeed


class _TrainerConfig(HfDeepSpeedConfig):
    """transformers' `HfTrainerDeepSpeedConfig`, whose constructor wants deepspeed, on accelerate's base class."""

    mismatches: list[str]
    is_auto = HfTrainerDeepSpeedConfig.is_auto
    fill_match = HfTrainerDeepSpeedConfig.fill_match
    fill_only = partialmethod(fill_match, must_match=False)
    trainer_config_process = HfTrainerDeepSpeedConfig.trainer_config_process
    trainer_config_finalize = HfTrainerDeepSpeedConfig.trainer_config_finalize


def _content(name: str) -> dict[str, Any]:
    return json.loads((RECIPES / "deepspeed" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", _DEEPSPEED)
def test_deepspeed_keys_are_documented(name: str) -> None:
    def check(section: str, values: dict[str, Any]) -> None:
        assert set(values) <= _KEYS[section], section
        for key, value in values.items():
            if isinstance(value, dict):
                check(key, value)

    check("", _content(name))


@pytest.mark.parametrize("name", _DEEPSPEED)
def test_transformers_fills_every_auto_value(name: str) -> None:
    config = _TrainerConfig(_content(name))
    config.mismatches = []
    args = load_recipe("internvl2_5/8b_stage2", ["max_grad_norm=0.5"], world_size=1).training
    config.trainer_config_process(args)
    config.trainer_config_finalize(args, torch.nn.Module(), 5500)  # would raise on a mismatch
    assert '"auto"' not in json.dumps(config.config)
    assert config.config["bf16"]["enabled"] is True and config.config["fp16"]["enabled"] is False
    assert (config.config["train_batch_size"], config.config["gradient_clipping"]) == (512, 0.5)


@pytest.mark.parametrize("name", _DEEPSPEED)
def test_deepspeed_of_the_launched_process(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = _launch(name, monkeypatch)
    _, environment = prepare_deepspeed_cmd_env(args)
    for key, value in environment.items():
        if key.startswith("ACCELERATE_"):
            monkeypatch.setenv(key, value)
    plugin = DeepSpeedPlugin()  # refuses what the two files say twice
    assert Path(environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"]).samefile(RECIPES / "deepspeed" / f"{name}.json")
    assert (plugin.zero_stage, plugin.zero3_init_flag) == (_STAGES[name], _STAGES[name] == 3)
    offload = "cpu" if name == "zero3_offload" else "none"
    assert (plugin.offload_param_device, plugin.offload_optimizer_device) == (offload, offload)
    assert plugin.zero3_save_16bit_model is (_STAGES[name] == 3)


def test_thresholds_of_the_original() -> None:
    """Its zero_stage{1,2,3}_config*.json: buckets of 1e9; 1e5 for 34b and 70b; 1e7 and 1e4 with offload."""
    plain, offload = (_content(name)["zero_optimization"] for name in ("zero3", "zero3_offload"))
    keys = ("sub_group_size", "reduce_bucket_size", "stage3_prefetch_bucket_size")
    assert [plain[key] for key in keys] == [1e9] * 3 and [offload[key] for key in keys] == [1e7] * 3
    assert plain["stage3_param_persistence_threshold"] == 1e5
    assert offload["stage3_param_persistence_threshold"] == 1e4
    for name in ("zero1", "zero2"):
        zero = _content(name)["zero_optimization"]
        assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == 1e9
