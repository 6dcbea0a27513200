"""Recipes: the bundled ones against numbers of the papers and scripts, and reading, overriding, saving, checking."""

from __future__ import annotations

import dataclasses
import re
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from internvl_hub.conversion.families import find
from internvl_hub.modeling_internvl_chat import InternVLChatModel
from internvl_hub.training.arguments import DataArguments, InternVLTrainingArguments, ModelArguments
from internvl_hub.training.preference_arguments import PreferenceArguments
from internvl_hub.training.recipe_checks import check_ready
from internvl_hub.training.recipe_fields import SECTIONS, RecipeError
from internvl_hub.training.recipes import RECIPES, Recipe, dump_recipe, list_recipes, load_recipe
from internvl_hub.training.tuning import prepare_for_tuning

_ROOT = RECIPES.parent
# What is trained, global batch, then per size: learning rate, drop path, weight decay. Sources: arXiv 2412.05271
# Table 3 (2.5), the scripts of OpenGVLab/InternVL under internvl_chat/shell and internvl_chat_gpt_oss/shell, model
# cards (1.2), XTuner 0.2.0's configurations. A question mark after a stage: numbers that nobody published.
_STAGES = """
internvl1_1 stage1       vit+mlp     16384  19b 2e-5 .2 .05
internvl1_1 stage2       vit5+mlp+llm 1024  19b 2e-5 0 .05
internvl1_2 stage1?      vit+mlp      8192  40b 1e-5 .2 .05
internvl1_2 stage2       all           512  40b 1e-5 .4 .05
internvl1_5 pretrain     vit+mlp      2048  2b 2e-5 .1 .01, 26b 1e-5 .2 .05
internvl1_5 pretrain     mlp          2048  4b 2e-4 0 .05, 40b 1e-4 0 .05
internvl1_5 finetune     all          1024  2b 4e-5 .1 .01, 4b 4e-5 .1 .05, 26b 2e-5 .4 .05, 40b 2e-5 .4 .05
internvl1_5 2nd_full     mlp+llm       128  2b 4e-5 .1 .01, 4b 4e-5 .1 .05, 26b 2e-5 .4 .05
internvl1_5 2nd_lora     lora16         16  2b 4e-5 0 .01, 4b 4e-5 0 .05, 26b 2e-5 0 .05
internvl1_5 xtuner_full  mlp+llm       128  2b 1e-6 0 .05, 4b 1e-6 0 .05
internvl1_5 xtuner_full  mlp+llm        64  26b 1e-6 0 .05
internvl1_5 xtuner_lora  mlp+lora128   128  2b 1e-6 0 .05, 4b 1e-6 0 .05
internvl1_5 xtuner_lora  mlp+lora128    64  26b 1e-6 0 .05
internvl1_5 xtuner_qlora mlp+lora128   128  2b 1e-6 0 .05, 4b 1e-6 0 .05
internvl1_5 xtuner_qlora mlp+lora128    64  26b 1e-6 0 .05
internvl2   pretrain     vit+mlp      2048  2b 2e-5 .1 .01, 26b 1e-5 .2 .05
internvl2   pretrain?    vit+mlp      2048  1b 2e-5 .1 .01, 8b 2e-5 .1 .05
internvl2   pretrain     mlp          2048  4b 2e-4 0 .05, 40b 1e-4 0 .05
internvl2   pretrain?    mlp          2048  76b 1e-4 0 .05
internvl2   finetune     all          1024  2b 4e-5 .1 .01, 4b 4e-5 .1 .05, 26b 2e-5 .4 .05, 40b 2e-5 .4 .05
internvl2   finetune?    all          1024  1b 4e-5 .1 .01, 8b 4e-5 .1 .05, 76b 2e-5 .4 .05
internvl2   domain       all            64  1b 1e-5 .1 .01, 2b 1e-5 .1 .01, 4b 1e-5 .1 .01
internvl2   2nd_full     mlp+llm       128  1b 4e-5 .1 .01, 2b 4e-5 .1 .01, 4b 4e-5 .1 .05, 8b 4e-5 .1 .05
internvl2   2nd_full     mlp+llm       128  26b 2e-5 .4 .05, 40b 2e-5 .4 .05, 76b 2e-5 .4 .05
internvl2   2nd_lora     lora16         16  1b 4e-5 0 .01, 2b 4e-5 0 .01, 4b 4e-5 0 .05, 8b 4e-5 0 .05
internvl2   2nd_lora     lora16         16  26b 2e-5 0 .05, 40b 2e-5 0 .05, 76b 2e-5 0 .05
internvl2   mpo          all           256  8b 5e-6 .1 .05
internvl2   xtuner_full  mlp+llm       128  2b 1e-6 0 .05, 4b 1e-6 0 .05, 8b 1e-6 0 .05
internvl2   xtuner_full  mlp+llm        64  26b 1e-6 0 .05
internvl2   xtuner_lora  mlp+lora128   128  2b 1e-6 0 .05, 4b 1e-6 0 .05, 8b 1e-6 0 .05
internvl2   xtuner_lora  mlp+lora128    64  26b 1e-6 0 .05
internvl2   xtuner_qlora mlp+lora128   128  2b 1e-6 0 .05, 4b 1e-6 0 .05, 8b 1e-6 0 .05
internvl2   xtuner_qlora mlp+lora128    64  26b 1e-6 0 .05
internvl2_5 stage1       mlp           512  1b 2e-4 0 .01, 2b 2e-4 0 .01, 4b 2e-4 0 .01, 8b 2e-4 0 .05
internvl2_5 stage1       mlp           512  26b 2e-4 0 .05, 38b 2e-4 0 .05, 78b 2e-4 0 .05
internvl2_5 stage1_5     vit+mlp      1024  8b 1e-5 .1 .05, 26b 1e-5 .4 .05
internvl2_5 stage2       all           512  1b 4e-5 .1 .01, 2b 4e-5 .1 .01, 4b 4e-5 .1 .01, 8b 4e-5 .1 .05
internvl2_5 stage2       all           512  26b 2e-5 .4 .05, 38b 2e-5 .4 .05, 78b 2e-5 .4 .05
internvl2_5 2nd_full     mlp+llm       128  1b 4e-5 .1 .01, 2b 4e-5 .1 .01, 4b 4e-5 .1 .01, 8b 4e-5 .1 .05
internvl2_5 2nd_full     mlp+llm       128  26b 2e-5 .4 .05, 38b 2e-5 .4 .05, 78b 2e-5 .4 .05
internvl2_5 2nd_lora     lora16         16  1b 4e-5 0 .01, 2b 4e-5 0 .01, 4b 4e-5 0 .01, 8b 4e-5 0 .05
internvl2_5 2nd_lora     lora16         16  26b 2e-5 0 .05, 38b 2e-5 0 .05, 78b 2e-5 0 .05
internvl2_5 2nd_lora_coco lora128      512  2b 4e-5 0 .01
internvl2_5 mpo          all           256  1b 1e-6 .1 .05, 2b 1e-6 .1 .05, 4b 1e-6 .1 .05, 8b 1e-6 .1 .05
internvl2_5 mpo          all           256  26b 1e-6 .4 .05
internvl2_5 mpo          all           512  38b 1e-6 .4 .05, 78b 1e-6 .4 .05
internvl3   pretrain?    all           512  1b 2e-5 0 .05, 2b 2e-5 0 .05, 8b 2e-5 0 .05, 9b 2e-5 0 .05
internvl3   pretrain?    all           512  14b 2e-5 .1 .05, 38b 2e-5 .2 .05, 78b 2e-5 .4 .05
internvl3   sft?         all           512  1b 1e-5 0 .05, 2b 2e-5 0 .05, 8b 2e-5 0 .05, 9b 2e-5 0 .05
internvl3   sft?         all           512  14b 2e-5 .1 .05, 38b 2e-5 .2 .05, 78b 2e-5 .4 .05
internvl3   2nd_full     mlp+llm       128  1b 1e-5 0 .05, 2b 2e-5 0 .05, 8b 2e-5 0 .05, 9b 2e-5 0 .05
internvl3   2nd_full     mlp+llm       128  14b 2e-5 .1 .05, 38b 2e-5 .2 .05, 78b 2e-5 .4 .05
internvl3   2nd_lora?    lora16         16  1b 1e-5 0 .05, 2b 2e-5 0 .05, 8b 2e-5 0 .05, 9b 2e-5 0 .05
internvl3   2nd_lora?    lora16         16  14b 2e-5 0 .05, 38b 2e-5 0 .05, 78b 2e-5 0 .05
internvl3   mpo          all           256  1b 2e-7 .1 .05, 2b 2e-7 .1 .05, 8b 2e-7 .1 .05, 9b 2e-7 .1 .05
internvl3   mpo          all           256  14b 2e-7 .1 .05
internvl3   mpo          all           512  38b 2e-7 .4 .05, 78b 2e-7 .4 .05
internvl3_5 stage0       mlp           256  20b_a4b 1e-3 .1 .05
internvl3_5 stage0?      mlp           256  1b 1e-3 0 .05, 2b 1e-3 0 .05, 4b 1e-3 0 .05
internvl3_5 stage0?      mlp           256  8b 1e-3 .1 .05, 14b 1e-3 .1 .05
internvl3_5 stage0?      mlp           256  30b_a3b 1e-3 .1 .05, 38b 1e-3 .4 .05, 241b_a28b 1e-3 .4 .05
internvl3_5 stage1       all           512  20b_a4b 2e-5 .1 .05
internvl3_5 stage1?      all           512  1b 2e-5 0 .05, 2b 2e-5 0 .05, 4b 2e-5 0 .05
internvl3_5 stage1?      all           512  8b 2e-5 .1 .05, 14b 2e-5 .1 .05
internvl3_5 stage1?      all           512  30b_a3b 2e-5 .1 .05, 38b 2e-5 .4 .05, 241b_a28b 2e-5 .4 .05
internvl3_5 sft          all           512  1b 8e-5 0 .05, 2b 8e-5 0 .05, 4b 8e-5 0 .05
internvl3_5 sft          all           512  8b 8e-5 .1 .05, 14b 8e-5 .1 .05
internvl3_5 sft          all           512  20b_a4b 8e-5 .1 .05, 30b_a3b 8e-5 .1 .05, 38b 8e-5 .4 .05
internvl3_5 sft          all           512  241b_a28b 2e-5 .4 .05
internvl3_5 mpo          all           256  1b 2e-7 0 .05, 2b 2e-7 0 .05, 4b 2e-7 0 .05
internvl3_5 mpo          all           256  8b 2e-7 .1 .05, 14b 2e-7 .1 .05
internvl3_5 mpo          all           256  20b_a4b 2e-7 .1 .05, 30b_a3b 2e-7 .1 .05
internvl3_5 mpo          all           256  38b 2e-7 .4 .05, 241b_a28b 2e-7 .4 .05
internvl3_5 2nd_full?    mlp+llm       128  1b 1e-5 0 .05, 2b 2e-5 0 .05, 4b 2e-5 0 .05
internvl3_5 2nd_full?    mlp+llm       128  8b 2e-5 .1 .05, 14b 2e-5 .1 .05
internvl3_5 2nd_full?    mlp+llm       128  20b_a4b 2e-5 .1 .05, 30b_a3b 2e-5 .1 .05, 38b 2e-5 .4 .05
internvl3_5 2nd_full?    mlp+llm       128  241b_a28b 2e-5 .4 .05
internvl3_5 2nd_lora?    lora16         16  1b 1e-5 0 .05, 2b 2e-5 0 .05, 4b 2e-5 0 .05
internvl3_5 2nd_lora?    lora16         16  8b 2e-5 0 .05, 14b 2e-5 0 .05
internvl3_5 2nd_lora?    lora16         16  20b_a4b 2e-5 0 .05, 30b_a3b 2e-5 0 .05
internvl3_5 2nd_lora?    lora16         16  38b 2e-5 0 .05, 241b_a28b 2e-5 0 .05
"""
# Per stage: longest row, tokens and tiles of a pack (0: padded batches), steps (0: one epoch), warm-up, most tiles of
# an image if the recipe says, label weights. Sizes in brackets differ from their stage.
_LIMITS = """
internvl1_1 stage1         384 0 0      0 100    - token
internvl1_1 stage2         768 0 0      0 .03    - token
internvl1_2 stage1        2048 0 0   4800 100    - token
internvl1_2 stage2        2048 0 0      0 .03    - token
internvl1_5 pretrain      4096 0 0      0 100   12 token
internvl1_5 finetune      8192 0 0      0 .03    - token
internvl1_5 finetune[26b] 4096 0 0      0 .03    - token
internvl1_5 finetune[40b] 4096 0 0      0 .03    - token
internvl1_5 2nd           4096 0 0      0 .03   12 token
internvl1_5 xtuner        8192 0 0      0 .03    - token
internvl1_5 xtuner[26b]   4096 0 0      0 .03    - token
internvl2   pretrain      8192 0 0      0 100   12 token
internvl2   finetune      8192 0 0      0 .03    - token
internvl2   domain        8192 16384 48 2200 .03 - square
internvl2   2nd           4096 0 0      0 .03    6 token
internvl2   mpo           6144 0 0      0 .03   12 token
internvl2   xtuner        8192 0 0      0 .03    - token
internvl2_5 stage1       16384 16384 48 100000 100 12 square
internvl2_5 stage1_5     16384 16384 48 100000 100 - square
internvl2_5 stage2       16384 16384 48   5500 .03 - square
internvl2_5 stage2[1b]   16384 16384 48  22000 .03 - square
internvl2_5 stage2[2b]   16384 16384 48  22000 .03 - square
internvl2_5 stage2[4b]   16384 16384 48  11000 .03 - square
internvl2_5 2nd           8192 0 0      0 .03    6 token
internvl2_5 mpo           8192 0 0      0 .03   12 token
internvl3   pretrain     32768 32768 96  12000 .03 12 square
internvl3   sft          16384 16384 48      0 .03 - square
internvl3   2nd          16384 0 0      0 .03   12 token
internvl3   mpo          12288 0 0      0 .03   12 token
internvl3   mpo[38b]      8192 0 0      0 .03   12 token
internvl3   mpo[78b]      8192 0 0      0 .03   12 token
internvl3_5 stage0       16384 32768 96   5000 .01 12 square
internvl3_5 stage1       32768 32768 96  15000 .03 - square
internvl3_5 sft          32768 32768 96   8000 .03 - square
internvl3_5 mpo          16384 0 0      0 .03   12 token
internvl3_5 2nd          16384 0 0      0 .03   12 token
"""
_NAMES = {
    "internvl1_1": "InternVL-Chat-V1-1",
    "internvl1_2": "InternVL-Chat-V1-2",
    "internvl1_5": {
        "2b": "Mini-InternVL-Chat-2B-V1-5",
        "4b": "Mini-InternVL-Chat-4B-V1-5",
        "26b": "InternVL-Chat-V1-5",
    },
    "internvl2": {"76b": "InternVL2-Llama3-76B"},
    "internvl3_5": {"20b_a4b": "InternVL3_5-GPT-OSS-20B-A4B-Preview"},
}
_TINY = ["tiny/lora", "tiny/mpo", "tiny/packed", "tiny/stage1", "tiny/stage1_5", "tiny/stage2"]


@dataclasses.dataclass(frozen=True)
class _Expected:
    trained: str
    batch: int
    learning_rate: float
    drop_path: float
    weight_decay: float


def _expected() -> dict[str, _Expected]:
    table = {}
    for line in _STAGES.strip().splitlines():
        generation, stage, trained, batch, sizes = line.split(maxsplit=4)
        for size, *numbers in map(str.split, sizes.split(", ")):
            name = f"{generation}/{size}_{stage.removesuffix('?')}"
            assert name not in table, name
            table[name] = _Expected(trained, int(batch), *map(float, numbers))
    return table


def _limits(name: str) -> list[str]:
    generation, rest = name.split("/")
    size, stage = re.fullmatch(r"(\d+b(?:_a\d+b)?)_(.+)", rest).groups()
    rows = {(row.split()[0], row.split()[1]): row.split()[2:] for row in _LIMITS.strip().splitlines()}
    for key in (f"{stage}[{size}]", f"{stage.split('_')[0]}[{size}]", stage, stage.split("_")[0]):
        if (generation, key) in rows:
            return rows[generation, key]
    raise KeyError(name)


def _release(name: str) -> str | None:
    """Name of the release that a stage leads to or starts from; None for the one that was not released."""
    generation, rest = name.split("/")
    size = rest[: re.match(r"\d+b(_a\d+b)?", rest).end()]
    names = _NAMES.get(generation, {})
    if isinstance(names, str):
        return names
    if generation == "internvl1_5":
        return names.get(size)
    prefix = {"internvl2": "InternVL2", "internvl2_5": "InternVL2_5", "internvl3": "InternVL3"}.get(generation)
    return names.get(size, f"{prefix or 'InternVL3_5'}-{size.replace('_', '-').upper()}")


_EXPECTED = _expected()
_PUBLISHED = sorted(_EXPECTED)


@cache
def _load(name: str) -> Recipe:
    return load_recipe(name)


# ----------------------------------------------------------------------------------------------------- bundled recipes


def test_every_bundled_recipe_is_in_the_table() -> None:
    assert list_recipes() == sorted([*_EXPECTED, *_TINY])


@pytest.mark.parametrize("name", _PUBLISHED)
def test_numbers_are_the_published_ones(name: str) -> None:
    recipe, expected = _load(name), _EXPECTED[name]
    training = recipe.training
    assert training.learning_rate == expected.learning_rate
    assert recipe.model.drop_path_rate == expected.drop_path
    assert training.weight_decay == expected.weight_decay
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == expected.batch
    length, tokens, tiles, steps, warmup, most, weights = _limits(name)
    assert training.max_seq_length == int(length)
    assert training.packing is (tokens != "0")
    if training.packing:
        assert (training.max_packed_tokens, training.num_images_expected) == (int(tokens), int(tiles))
    assert training.num_train_epochs == 1
    assert max(training.max_steps, 0) == int(steps)
    assert training.warmup_steps == float(warmup)
    assert training.loss_reduction == weights
    assert recipe.model.max_dynamic_patch == (None if most == "-" else int(most))
    assert (training.lr_scheduler_type, training.bf16, training.adam_beta2) == ("cosine", True, 0.999)
    assert (recipe.model.quantization == "nf4") == name.endswith("qlora")
    assert recipe.training.output_dir == f"runs/{name}"
    # The scripts' loss weights, TRL's beta, and nothing beyond them; only stages named so have pairs.
    assert recipe.preference == (PreferenceArguments(0.1, 0.8, 0.2, 1.0) if name.endswith("_mpo") else None)


@pytest.mark.parametrize("name", _PUBLISHED)
def test_weights_are_those_of_the_release(name: str) -> None:
    """Checkpoints are known repositories or outputs of the stage before; parts are those of the families' table."""
    recipe, release = _load(name), _release(name)
    model = recipe.model
    start = model.model_name_or_path
    if start is not None and start.startswith("runs/"):
        assert start.removeprefix("runs/") in list_recipes()
        assert _release(start.removeprefix("runs/")) == release
    elif start is not None:
        assert start in find(release).hub_ids
    else:
        assert model.conv_style
        if release:
            assert find(release).config().template == model.conv_style
            assert (find(release).config().ps_version, find(release).config().select_layer) == (
                model.ps_version,
                model.vision_select_layer,
            )
            llm = find(release).llm
            assert model.llm_path.split("/")[-1] in (llm, release, {"internlm3-8b": "internlm3-8b-instruct"}.get(llm))
        vit = find(model.vision_path).name
        first = {"InternVL2_5-8B": "InternViT-300M-448px", "InternVL2_5-26B": "InternViT-6B-448px-V1-5"}
        first["InternVL-Chat-V1-1"] = "InternViT-6B-224px"  # resized to 448 px in stage 1
        assert vit == (first.get(release) or find(release or "InternVL2-40B").encoder)


def _trainable(model: nn.Module) -> dict[str, int]:
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


def _model(release: str, layers: int | None = None) -> InternVLChatModel:
    """A release on the meta device, or its first layers."""
    found = find(release)
    if layers is not None:
        found = dataclasses.replace(
            found,
            vision={**found.vision, "num_hidden_layers": layers},
            language_model={**found.language_model, "num_hidden_layers": layers},
        )
    with torch.device("meta"):
        return InternVLChatModel(found.config())


_BY_RELEASE: dict[str, list[str]] = {}
for _name in _PUBLISHED:
    _BY_RELEASE.setdefault(_release(_name) or "InternVL2-40B", []).append(_name)  # 1.5's 40B has 2.0's shape


@pytest.mark.newest
@pytest.mark.parametrize("release", sorted(_BY_RELEASE))
def test_what_is_trained(release: str) -> None:
    """On the released shape at full size; LoRA on two layers, once per kind of language model."""
    model, sizes = _model(release), {}
    for parameter, value in model.named_parameters():
        part = parameter.split(".")[0]
        sizes[part] = sizes.get(part, 0) + value.numel()
    unread = {"InternVL-Chat-V1-1": 3 * 122_918_400}.get(release, 0)  # layers behind select_layer -4
    parts = {"vit": sizes["vision_model"] - unread, "mlp": sizes["mlp1"], "llm": sizes["language_model"]}
    parts["vit5"] = 5 * 122_918_400 - unread
    prefixes = {"vit": "vision_model", "vit5": "vision_model", "mlp": "mlp1", "llm": "language_model"}
    for name in _BY_RELEASE[release]:
        trained = "vit+mlp+llm" if (trained := _EXPECTED[name].trained) == "all" else trained
        if "lora" in trained:
            args, dropout = _load(name).training, 0.0 if "-A" in release else 0.05
            assert (args.use_llm_lora, args.lora_dropout) == (int(trained.rpartition("lora")[2]), dropout)
            _check_lora(find(release).language_model["architectures"][0], trained, release, name)
            continue
        found = _trainable(prepare_for_tuning(model, _load(name).training))
        assert sum(found.values()) == sum(parts[part] for part in trained.split("+")), name
        assert {parameter.split(".")[0] for parameter in found} == {prefixes[p] for p in trained.split("+")}, name


_CHECKED: set[tuple[str, str]] = set()


def _check_lora(architecture: str, trained: str, release: str, name: str) -> None:
    if (architecture, trained) in _CHECKED:
        return
    tuned = prepare_for_tuning(_model(release, 2), _load(name).training)
    found = _trainable(tuned)
    adapters = {parameter for parameter in found if ".lora_" in parameter}
    assert adapters and all("language_model" in parameter for parameter in adapters)
    rest = set(found) - adapters
    assert bool(rest) == ("mlp" in trained) and all(".mlp1." in parameter for parameter in rest)
    config, rank = tuned.peft_config["default"], int(trained.rpartition("lora")[2])
    assert (config.r, config.lora_alpha) == (rank, 2 * rank)
    _CHECKED.add((architecture, trained))


@pytest.mark.parametrize("name", _TINY)
def test_tiny_recipes_are_small_and_on_the_cpu(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.training.use_cpu and not recipe.training.bf16
    assert recipe.training.max_steps <= 100
    assert (_ROOT / recipe.model.model_name_or_path / "model.safetensors").is_file()
    check_ready(load_recipe(name, [f"data.data_paths={__file__}"]))


@pytest.mark.parametrize("name", [*_PUBLISHED, *_TINY])
def test_a_header_says_what_and_from_where(name: str) -> None:
    lines = _load(name).source.splitlines()
    header = " ".join(line for line in lines if line.startswith("# "))
    assert lines[0].startswith("# ")
    unpublished = ("Numbers not published", "Not published", "not published", "Numbers of InternVL 1.5")
    assert name in _TINY or "Source" in header or any(word in header for word in unpublished)
    assert all(len(line) <= 119 for line in lines)


# ------------------------------------------------------------------------------------------------------------- reading


def _write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def _recipe(folder: Path, *lines: str, name: str = "mine.yaml") -> Path:
    return _write(folder, name, "\n".join(["model:", "  model_name_or_path: a/b", *lines]) + "\n")


def test_bare_recipe_gives_the_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(_recipe(tmp_path))
    assert recipe.name == "mine"
    assert recipe.model == ModelArguments(model_name_or_path="a/b")
    assert recipe.data == DataArguments()
    assert recipe.training == InternVLTrainingArguments(output_dir="runs/mine")


def test_values_take_the_type_of_their_field(tmp_path: Path) -> None:
    path = _recipe(
        tmp_path,
        "training:",
        "  {learning_rate: 1e-5, weight_decay: 0, max_steps: 1e3, eval_strategy: no, run_name: 7, use_cpu: yes,",
        "   warmup_steps: '2e-2', lora_alpha: 8, label_names: labels, report_to: [], save_strategy: best,",
        "   lr_scheduler_kwargs: {min_lr: 1e-7}}",
        "data: {repeat_times: [2, 0.5], data_paths: [a.jsonl, 1], image_folders: [null, images]}",
    )
    recipe = load_recipe(path)
    training = recipe.training
    expected = {
        "learning_rate": 1e-5, "weight_decay": 0.0, "max_steps": 1000, "run_name": "7", "use_cpu": True,
        "warmup_steps": 0.02, "lora_alpha": 8.0, "label_names": ["labels"], "report_to": [],
        "lr_scheduler_kwargs": {"min_lr": 1e-7},
    }  # fmt: skip
    for field, value in expected.items():
        found = getattr(training, field)
        assert found == value and type(found) is type(value), field
    assert (training.eval_strategy.value, training.save_strategy.value) == ("no", "best")
    assert (recipe.data.repeat_times, recipe.data.data_paths) == ([2.0, 0.5], ["a.jsonl", "1"])
    assert recipe.data.image_folders == [None, "images"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("training: {learning_rate: fast}", "training.learning_rate must be float, got 'fast'"),
        ("training: {max_steps: 1.5}", "training.max_steps must be int, got 1.5"),
        ("training: {max_steps: null}", "training.max_steps must be int, got None"),
        ("training: {packing: 2}", "training.packing must be bool, got 2"),
        ("training: {run_name: 1e5}", "training.run_name must be str or null, got 100000.0"),
        ("training: {seed: true}", "training.seed must be int, got True"),
        ("data: {repeat_times: [1, many]}", "data.repeat_times must be float, got 'many'"),
        ("training: {lerning_rate: 1}", "unknown key 'training.lerning_rate'; did you mean learning_rate"),
        ("trainin: {}", "unknown key 'trainin'; did you mean training?"),
        ("training: [1]", r"training must be a mapping of fields, got \[1\]"),
        ("global_batch_size: 0", "global_batch_size must be at least 1, got 0"),
        ("extends: 3", "extends must be a path or a list of paths, got 3"),
        ("extends: nowhere.yaml", "no recipe 'nowhere.yaml'"),
        ("data: {exif: true, exif: false}", "key 'exif' is given twice"),
        ("data: {", "not valid YAML"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", value)[:40],
)
def test_errors_name_file_key_and_value(tmp_path: Path, line: str, message: str) -> None:
    path = _recipe(tmp_path, line)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value) or "no recipe" in message


def test_an_error_in_a_base_names_the_base(tmp_path: Path) -> None:
    base = _write(tmp_path, "base.yaml", "training: {sed: 1}\n")
    with pytest.raises(RecipeError, match=f"{re.escape(str(base))}: unknown key 'training.sed'; did you mean seed"):
        load_recipe(_recipe(tmp_path, "extends: base.yaml"))


def test_errors_of_the_arguments_name_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="mine: model_name_or_path and llm_path exclude one another"):
        load_recipe(_recipe(tmp_path), ["llm_path=c/d"])


def test_later_files_win_and_dictionaries_merge(tmp_path: Path) -> None:
    _write(tmp_path, "sub/one.yaml", "training: {seed: 1, max_steps: 1, lr_scheduler_kwargs: {a: 1, b: {c: 1, d: 1}}}")
    _write(tmp_path, "two.yaml", "training: {seed: 2, lr_scheduler_kwargs: {b: {c: 2}}}\ndata: {data_paths: [a, b]}")
    path = _recipe(
        tmp_path, "extends: [sub/one.yaml, two.yaml]", "data: {data_paths: [c]}", "training: {max_steps: 3}"
    )
    recipe = load_recipe(path)
    assert (recipe.training.seed, recipe.training.max_steps, recipe.data.data_paths) == (2, 3, ["c"])
    assert recipe.training.lr_scheduler_kwargs == {"a": 1, "b": {"c": 2, "d": 1}}


def test_a_cycle_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, "a.yaml", "extends: b.yaml")
    path = _write(tmp_path, "b.yaml", "extends: a.yaml")
    with pytest.raises(RecipeError, match="b.yaml extends .*a.yaml extends .*b.yaml: a cycle"):
        load_recipe(path)
    diamond = _recipe(tmp_path, "extends: [left.yaml, right.yaml]")
    for side in ("left", "right"):
        _write(tmp_path, f"{side}.yaml", "extends: top.yaml")
    _write(tmp_path, "top.yaml", "training: {seed: 5}")
    assert load_recipe(diamond).training.seed == 5


def test_own_recipe_over_a_bundled_one(tmp_path: Path) -> None:
    path = _write(tmp_path, "mine.yaml", "extends: internvl2_5/8b_2nd_lora\ntraining: {use_llm_lora: 64}")
    recipe = load_recipe(path)
    assert (recipe.training.use_llm_lora, recipe.training.output_dir) == (64, "runs/mine")
    assert recipe.model.model_name_or_path == "OpenGVLab/InternVL2_5-8B"


def test_a_bundled_recipe_is_found_by_name_or_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("tiny/lora", "tiny/lora.yaml", RECIPES / "tiny" / "lora.yaml")
    assert {load_recipe(name).name for name in names} == {"tiny/lora"}
    with pytest.raises(RecipeError, match=r"no recipe 'internvl2_5/8b_stag2'.*internvl2_5/8b_stage2"):
        load_recipe("internvl2_5/8b_stag2")


# ----------------------------------------------------------------------------------------------------------- overrides


def test_overrides_win_in_order(tmp_path: Path) -> None:
    path = _recipe(tmp_path, "training: {seed: 1}")
    overrides = [
        "training.seed=2", "learning_rate=1e-5", "seed=3", "data.data_paths=[a.jsonl, b.jsonl]", "run_name=no",
        "model.config.llm_config.hidden_size=64", "config.llm_config.num_hidden_layers=2", "max_seq_length=null",
        "meta_path=", "optim_args=a=1,b=2", "project=1e5", "hub_revision=true",
    ]  # fmt: skip
    recipe = load_recipe(path, overrides)
    assert (recipe.training.seed, recipe.training.learning_rate, recipe.training.run_name) == (3, 1e-5, "no")
    assert recipe.data.data_paths == ["a.jsonl", "b.jsonl"]
    assert recipe.model.config == {"llm_config": {"hidden_size": 64, "num_hidden_layers": 2}}
    assert (recipe.training.project, recipe.training.hub_revision) == ("1e5", "true")
    assert (recipe.data.meta_path, recipe.training.optim_args) == (None, "a=1,b=2")


def test_epochs_replace_the_steps_below_them(tmp_path: Path) -> None:
    """transformers trains `max_steps` if both are given."""

    def limits(path: Path, *overrides: str) -> tuple[int, float]:
        training = load_recipe(path, overrides).training
        return training.max_steps, training.num_train_epochs

    base = _recipe(tmp_path, "training: {max_steps: 50}", name="base.yaml")
    own = _recipe(tmp_path, "extends: base.yaml\ntraining: {num_train_epochs: 2}", name="own.yaml")
    assert limits(base) == (50, 3.0) and limits(own) == (-1, 2.0)
    assert limits(base, "num_train_epochs=4") == (-1, 4.0)
    assert limits(base, "training.num_train_epochs=4", "max_steps=7") == (7, 4.0)
    both = _recipe(tmp_path, "training: {max_steps: 9, num_train_epochs: 1}", name="both.yaml")
    assert limits(both) == (9, 1.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "write section.field=value"),
        ("--seed=1", "write section.field=value"),
        ("sed=1", "unknown key 'sed'; did you mean seed"),
        ("training.sed=1", "unknown key 'training.sed'; did you mean seed"),
        ("seed=x", "training.seed must be int, got 'x'"),
        ("training.seed.deep=1", "training.seed is not a mapping, it has no 'deep'"),
        ("training=1", "unknown key 'training'"),
        ("global_batch_size=x", "global_batch_size must be int, got 'x'"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", value)[:40],
)
def test_bad_overrides(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        load_recipe(_recipe(tmp_path), [override])
    assert override in str(caught.value)


def test_no_name_is_in_two_sections() -> None:
    """Else a bare name in an override would be ambiguous; the error for that is below."""
    names = [field.name for cls in SECTIONS.values() for field in dataclasses.fields(cls)]
    assert len(names) == len(set(names))


def test_an_ambiguous_name_needs_its_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SECTIONS, "more", ModelArguments)
    with pytest.raises(RecipeError, match="llm_path is a field of model and more; name the section"):
        load_recipe(_recipe(tmp_path), ["llm_path=a"])


# -------------------------------------------------------------------------------------------------------- global batch


def test_global_batch_becomes_accumulation_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _recipe(tmp_path, "training: {per_device_train_batch_size: 4}", "global_batch_size: 96")
    for world_size in (1, 2, 3, 24):
        steps = load_recipe(path, world_size=world_size).training.gradient_accumulation_steps
        assert steps * 4 * world_size == 96
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert load_recipe(path).training.gradient_accumulation_steps == 3
    assert load_recipe(path, ["global_batch_size=null"]).training.gradient_accumulation_steps == 1
    default = load_recipe(_recipe(tmp_path, "global_batch_size: 128"), world_size=4)
    assert default.training.gradient_accumulation_steps * default.training.per_device_train_batch_size * 4 == 128


@pytest.mark.parametrize(("batch", "nearest"), [(512, "480 or 528"), (50, "48 or 96"), (5, "48")])
def test_a_batch_that_cannot_be_shared(tmp_path: Path, batch: int, nearest: str) -> None:
    path = _recipe(tmp_path, "training: {per_device_train_batch_size: 4}", f"global_batch_size: {batch}")
    message = (
        f"={batch} is not a multiple of per_device_train_batch_size 4 x 12 processes = 48; nearest.*=({nearest})$"
    )
    with pytest.raises(RecipeError, match=message):
        load_recipe(path, world_size=12)


def test_global_batch_and_accumulation_exclude_one_another(tmp_path: Path) -> None:
    path = _recipe(tmp_path, "global_batch_size: 16")
    with pytest.raises(RecipeError, match="add global_batch_size=null"):
        load_recipe(path, ["gradient_accumulation_steps=2"])
    recipe = load_recipe(path, ["gradient_accumulation_steps=2", "global_batch_size=null"])
    assert recipe.training.gradient_accumulation_steps == 2


# ------------------------------------------------------------------------------------------------- section preference


@pytest.mark.parametrize("section", ["preference: {}", "preference: {beta: 0.1}"], ids=["empty", "full"])
def test_a_recipe_has_preferences_where_it_has_the_section(tmp_path: Path, section: str) -> None:
    assert load_recipe(_recipe(tmp_path)).preference is None
    recipe = load_recipe(_recipe(tmp_path, section))
    assert recipe.preference == PreferenceArguments()
    _write(tmp_path, "base.yaml", section)
    above = load_recipe(_recipe(tmp_path, "extends: base.yaml", "preference: {quality_weight: 0.5}"))
    assert above.preference == PreferenceArguments(quality_weight=0.5)


@pytest.mark.parametrize(
    ("overrides", "beta"),
    [(["preference.beta=0.2"], 0.2), (["beta=0.2"], 0.2), (["preference={}"], 0.1), (["preference={beta: 2}"], 2.0)],
    ids=["field", "bare", "empty", "mapping"],
)
def test_an_override_can_give_the_section(tmp_path: Path, overrides: list[str], beta: float) -> None:
    recipe = load_recipe(_recipe(tmp_path), overrides)
    assert recipe.preference is not None and recipe.preference.beta == beta


def test_null_takes_the_section_away(tmp_path: Path) -> None:
    assert load_recipe("tiny/mpo").preference is not None
    without = load_recipe("tiny/mpo", ["preference=null"])
    assert without.preference is None and "preference" not in yaml.safe_load(dump_recipe(without))
    _write(tmp_path, "base.yaml", "preference: {beta: 0.3}")
    path = _recipe(tmp_path, "extends: base.yaml", "preference: null")
    assert load_recipe(path).preference is None
    assert load_recipe(path, ["label_smoothing=0.1"]).preference == PreferenceArguments(label_smoothing=0.1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("preference.bta=1", "unknown key 'preference.bta'; did you mean beta"),
        ("preference.beta=much", "preference.beta must be float, got 'much'"),
        ("preference=1", "preference must be a mapping of fields, got 1"),
        ("beta=0", "mine: beta must be above 0, got 0"),
        ("preferenc.beta=1", "unknown key 'preferenc.beta'; did you mean preference"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", value)[:40],
)
def test_preferences_are_checked_as_other_sections(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(_recipe(tmp_path), [override])


@pytest.mark.parametrize("overrides", [["preference={}"], ["beta=0.2", "preference.reference_path=a/b"]], ids=len)
def test_a_saved_recipe_keeps_its_preferences(tmp_path: Path, overrides: list[str]) -> None:
    recipe = load_recipe(_recipe(tmp_path), overrides)
    text = dump_recipe(recipe)
    again = load_recipe(_write(tmp_path, "saved.yaml", text), ["output_dir=runs/mine"])
    assert again.preference == recipe.preference is not None and again.training == recipe.training
    assert yaml.safe_load(text)["preference"] == dict(recipe.settings["preference"])


# ------------------------------------------------------------------------------------------------------ saving, checks


@pytest.mark.parametrize("name", ["internvl2_5/8b_stage2", "internvl2/26b_xtuner_qlora", "tiny/packed"])
def test_a_saved_recipe_loads_to_equal_arguments(tmp_path: Path, name: str) -> None:
    overrides = ["data.data_paths=[a.jsonl]", "data.image_folders=[null]", "run_name=1e5", "model.config.x={'no': 1}"]
    recipe = load_recipe(name, [*overrides, "eval_strategy=no", "save_strategy=epoch"], world_size=2)
    text = dump_recipe(recipe)
    again = load_recipe(_write(tmp_path, "saved.yaml", text), world_size=2)
    assert (again.model, again.data, again.training) == (recipe.model, recipe.data, recipe.training)
    assert again.training.run_name == "1e5"
    content = yaml.safe_load(text)  # YAML 1.1 reads the same
    assert content["training"]["run_name"] == "1e5" and content["model"]["config"] == {"x": {"no": 1}}
    assert "eval_strategy" not in content["training"]  # the default
    assert content["global_batch_size"] == recipe.settings["global_batch_size"]


def test_checkpointing_has_the_name_that_transformers_prefers(tmp_path: Path) -> None:
    field = "activation_checkpointing"
    field = (
        field if field in {f.name for f in dataclasses.fields(InternVLTrainingArguments)} else "gradient_checkpointing"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recipe = load_recipe(_recipe(tmp_path), ["gradient_checkpointing=true"])
        again = load_recipe(_write(tmp_path, "saved.yaml", dump_recipe(recipe)), ["output_dir=x"])
    assert recipe.settings["training"][field] is True
    assert getattr(recipe.training, field) and getattr(again.training, field)


def test_source_is_the_text_of_the_file(tmp_path: Path) -> None:
    path = _recipe(tmp_path, "# a remark")
    assert load_recipe(path).source == path.read_text()


def test_training_needs_data(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"tiny/lora does not say what to train on; add data.meta_path=path/to/meta"):
        check_ready(load_recipe("tiny/lora"))
    with pytest.raises(RecipeError, match="data.meta_path: nowhere.json does not exist"):
        check_ready(load_recipe("tiny/lora", ["data.meta_path=nowhere.json"]))
    meta = _write(tmp_path, "meta.json", "{}")
    check_ready(load_recipe("tiny/lora", [f"data.meta_path={meta}"]))


def test_training_needs_the_stage_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = [f"data.meta_path={_write(tmp_path, 'meta.json', '{}')}", "training.use_cpu=true"]
    recipe = load_recipe("internvl2_5/8b_stage2", options)
    with pytest.raises(RecipeError, match=r"8b_stage1_5 does not exist; run the stage before this one"):
        check_ready(recipe)
    (tmp_path / "runs/internvl2_5/8b_stage1_5").mkdir(parents=True)
    check_ready(recipe)
    check_ready(load_recipe("internvl2_5/8b_stage1", options))  # names on the Hub are not looked up
    with pytest.raises(RecipeError, match="hermes_2_yi_34b.pth does not exist; the recipe's header says"):
        check_ready(load_recipe("internvl1_2/40b_stage2", options))


def test_training_in_16_bits_does_not_fall_back_to_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    meta = f"data.meta_path={_write(tmp_path, 'meta.json', '{}')}"
    recipe = load_recipe("internvl3/8b_2nd_lora", [meta])
    assert recipe.training.use_cpu and recipe.training.bf16
    with pytest.raises(RecipeError, match="no accelerator was found; add training.use_cpu=true"):
        check_ready(recipe)
    check_ready(load_recipe("internvl3/8b_2nd_lora", [meta, "use_cpu=true"]))


# ------------------------------------------------------------------------------------------------------- documentation


def test_documentation_lists_every_recipe_with_its_numbers() -> None:
    text = (_ROOT / "docs" / "recipes.md").read_text()
    rows = {cells[0].strip(" `"): cells for line in text.splitlines() if len(cells := line.split("|")[1:-1]) == 5}
    for name, expected in _EXPECTED.items():
        cells = [cell.strip() for cell in rows[name]]
        assert float(cells[2]) == expected.learning_rate and int(cells[3].replace(",", "")) == expected.batch, name
    assert set(rows) - {"recipe", "---"} == set(_EXPECTED)


def test_documented_overrides_are_valid() -> None:
    text = (_ROOT / "docs" / "recipes.md").read_text()
    commands = re.findall(r"^internvl train (\S+)((?: [\w.]+=\S+)*)$", text, re.MULTILINE)
    assert len(commands) >= 3
    for name, overrides in commands:
        load_recipe(name, overrides.split())
