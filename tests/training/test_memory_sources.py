"""What a name stands for when memory is estimated: recipes, releases, folders, with overrides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from internvl_hub.app.cli import main
from internvl_hub.conversion import families
from internvl_hub.training.memory_settings import RunSettings
from internvl_hub.training.memory_sources import find_config, resolve
from internvl_hub.training.recipes import list_recipes

TINY = "checkpoints/internvl-tiny"


def test_a_recipe_of_packs() -> None:
    config, packed = resolve("internvl2_5/8b_stage2", devices=8)
    assert config.vision_config.num_hidden_layers == 24 and config.vision_config.drop_path_rate == 0.1
    assert (packed.tokens, packed.tiles, packed.packing, packed.dtype) == (16384, 48, True, "bfloat16")
    assert (packed.gradient_accumulation_steps, packed.mixed_precision) == (64, "bf16")


def test_a_recipe_of_rows_has_its_largest_image() -> None:
    _, lora = resolve("internvl2_5/1b_2nd_lora", tokens=4096)
    assert (lora.tokens, lora.tiles, lora.rows, lora.use_llm_lora) == (4096, 7, 4, 16)  # six tiles and a thumbnail
    assert lora.freeze_backbone and lora.freeze_llm and lora.freeze_mlp


def test_a_recipe_of_pairs_has_two_sequences_and_a_reference() -> None:
    config, pairs = resolve("internvl3/8b_mpo", devices=8, sharding="zero3")
    assert (pairs.pairs, pairs.reference, pairs.tokens, pairs.tiles) == (True, "copy", 12288, 13)
    assert config.max_dynamic_patch == 12 and pairs.gradient_accumulation_steps == 32
    assert (resolve("internvl3/8b_2nd_full")[1].pairs, resolve("internvl3/8b_2nd_full")[1].reference) == (False, None)


@pytest.mark.parametrize(
    ("recipe", "override", "reference"),
    [
        ("internvl3/1b_mpo", "precompute_reference=true", None),
        ("internvl3/1b_mpo", "reference_path=a/b", "checkpoint"),
        ("internvl3/1b_2nd_lora", "preference={}", None),  # the model below the adapters
        ("internvl3/1b_2nd_full", "preference={}", "copy"),
        ("internvl3/1b_2nd_lora", "preference.reference_path=a/b", "checkpoint"),
    ],
)
def test_the_reference_is_the_one_that_training_would_hold(recipe: str, override: str, reference: str | None) -> None:
    settings = resolve(recipe, [override])[1]
    assert settings.pairs and settings.reference == reference


def test_the_command_says_what_a_pair_takes(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    assert main(["estimate", "tiny/mpo"]) == 0
    shown = capsys.readouterr().out
    assert "4 pairs of answers, each sequence 512 tokens" in shown and "weights, reference" in shown
    assert main(["estimate", "tiny/mpo", "per_device_train_batch_size=1", "precompute_reference=true"]) == 0
    shown = capsys.readouterr().out
    assert "a pair of answers, each sequence 512 tokens" in shown and "weights, reference" not in shown


def test_overrides_reach_the_settings_and_the_configuration() -> None:
    overrides = [
        "training.use_llm_lora=64", "model.quantization=nf4", "model.max_dynamic_patch=3", "training.bf16=false",
        "training.optim=sgd", "model.dtype=float16", "model.attn_implementation=eager", "training.max_seq_length=2048",
    ]  # fmt: skip
    config, settings = resolve("internvl2_5/1b_2nd_lora", overrides)
    assert (settings.use_llm_lora, settings.quantization, settings.optim) == (64, "nf4", "sgd")
    assert (settings.tiles, settings.tokens, settings.mixed_precision) == (4, 2048, None)
    assert (settings.dtype, settings.attn_implementation) == ("bfloat16", "eager")  # float16 takes as many bytes
    assert config.max_dynamic_patch == 3


def test_a_recipe_can_take_another_model_and_keeps_its_own_overrides() -> None:
    config, settings = resolve("internvl2_5/8b_stage2", ["model.drop_path_rate=0.25"], "InternVL2_5-1B")
    assert config.llm_config.hidden_size == 896 and config.vision_config.drop_path_rate == 0.25
    assert settings.packing


@pytest.mark.parametrize("name", ["InternVL3-1B", "OpenGVLab/InternVL3-1B"])
def test_a_release_is_trained_whole(name: str) -> None:
    config, settings = resolve(name)
    assert config.to_dict() == families.find("InternVL3-1B").config().to_dict()
    assert settings == RunSettings(tokens=4096, tiles=13)
    assert resolve(name, ["training.freeze_backbone=true"], tokens=512, tiles=1, devices=2)[1] == RunSettings(
        tokens=512, tiles=1, devices=2, freeze_backbone=True
    )


def test_a_folder_says_its_precision_and_tiles(root: Path) -> None:
    config, settings = resolve(str(root / TINY))
    described = json.loads((root / TINY / "config.json").read_text(encoding="utf-8"))
    assert config.llm_config.hidden_size == described["llm_config"]["hidden_size"]
    assert settings.dtype == described["dtype"].removeprefix("torch.")
    assert settings.tiles == described["max_dynamic_patch"] + described["use_thumbnail"]


@pytest.mark.parametrize("name", [name for name in list_recipes() if not name.startswith("tiny/")])
def test_every_bundled_recipe_can_be_estimated(name: str) -> None:
    config, settings = resolve(name)
    assert 0 < sum(config.tokens_per_tile(settings.tiles)) < settings.tokens


def test_the_output_of_a_stage_has_the_configuration_of_the_stage_before() -> None:
    first, _ = resolve("internvl2_5/8b_stage1")
    second, _ = resolve("internvl2_5/8b_stage2")
    assert first.llm_config.to_dict() == second.llm_config.to_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("InternVL9-8B",), "InternVL9-8B"),
        (("InternVL3-1B", (), "x"), "--model goes with a recipe"),
        (("internvl2_5/8b_stage9",), "closest bundled recipes: internvl2_5/8b_stage"),
        (("InternVL3-1B", ["training.freeze_bakbone=true"]), "did you mean freeze_backbone"),
        (("InternVL3-1B", ["training.optim=adafactor"]), "optim must be one of .* got 'adafactor'"),
    ],
    ids=["release", "model", "recipe", "override", "optim"],
)
def test_wrong_names_say_what_is_right(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(*arguments)


def test_an_encoder_is_no_model() -> None:
    with pytest.raises(ValueError, match="vision encoder alone"):
        find_config("InternViT-300M-448px")
