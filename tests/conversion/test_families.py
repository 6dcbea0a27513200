"""The table of releases against published sizes, base models' known sizes and transformers' own InternVL classes."""

from __future__ import annotations

import datetime
import json
import re
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import chat_config
from transformers import InternVLConfig, InternVLForConditionalGeneration

from internvl_hub.configuration_internvl_chat import InternVLChatConfig
from internvl_hub.conversation import template_names
from internvl_hub.conversion import families
from internvl_hub.conversion.families import (
    Release,
    UnknownReleaseError,
    describe,
    describe_all,
    differences,
    find,
    identify,
    parameter_count,
    releases,
)

_ROOT = Path(families.__file__).parent.parent
_NAMES = [release.name for release in releases()]
_CHATS = [release.name for release in releases() if not release.is_encoder]
_UNITS = {"M": Decimal(10**6), "B": Decimal(10**9)}


@cache
def _counts(name: str) -> dict[str, int]:
    return parameter_count(find(name).config())


# --------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("name", _NAMES)
def test_size_is_the_published_one(name: str) -> None:
    counts = _counts(name)
    for part, text in find(name).published.items():
        number, unit = Decimal(text[:-1]), _UNITS[text[-1]]
        last_digit = Decimal(1).scaleb(int(number.as_tuple().exponent)) * unit
        # The card of InternViT-6B-448px-V1-2 prints 5540M for what the chat models' pages call 5.54B.
        last_digit *= 10 if text == "5540M" else 1
        assert abs(counts[part] - number * unit) <= last_digit / 2, f"{part}: {counts[part]:,} published as {text}"


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("InternViT-6B-224px", 5_902_793_600),
        ("InternViT-6B-448px-V1-0", 5_905_251_200),
        ("InternViT-6B-448px-V1-2", 5_536_496_000),
        ("InternViT-6B-448px-V1-5", 5_536_496_000),
        ("InternViT-6B-448px-V2_5", 5_536_496_000),
        ("InternViT-300M-448px", 304_012_288),
        ("InternViT-300M-448px-V2_5", 304_012_288),
    ],
)
def test_encoders_count_exactly(name: str, count: int) -> None:
    assert _counts(name) == {"vision": count, "projector": 0, "language_model": 0, "total": count}


def test_projectors_count_exactly() -> None:
    assert _counts("InternVL-Chat-V1-1")["projector"] == 91_786_240
    assert _counts("InternVL-Chat-V1-2")["projector"] == 143_170_560
    for name in _CHATS:
        release = find(name)
        width, features = release.language_model["hidden_size"], 4 * release.vision["hidden_size"]
        norm, linears = 2 * features, (features + 1) * width + (width + 1) * width
        assert _counts(name)["projector"] == norm + linears, name


# Base models by their own size: parameters, vocabulary rows, hidden size, whether the head is the embedding.
_INTERNLM3_LAYER = 2 * 4096 * 4096 + 2 * 4096 * 256 + 3 * 4096 * 10240 + 2 * 4096
_BASES = {
    "LLaMA2-13B": (13_015_864_320, 32000, 5120, False),
    "Nous-Hermes-2-Yi-34B": (34_388_917_248, 64000, 7168, False),
    "Hermes-2-Theta-Llama-3-70B": (70_553_706_496, 128256, 8192, False),
    "internlm2-chat-1_8b": (1_889_110_016, 92544, 2048, False),
    "internlm2_5-1_8b": (1_889_110_016, 92544, 2048, False),
    "internlm2_5-7b": (7_737_708_544, 92544, 4096, False),
    "internlm2-chat-20b": (19_861_149_696, 92544, 6144, False),
    "internlm2_5-20b": (19_861_149_696, 92544, 6144, False),
    "internlm3-8b": (48 * _INTERNLM3_LAYER + 2 * 128512 * 4096 + 4096, 128512, 4096, False),
    "Phi-3-mini": (3_821_079_552, 32064, 3072, False),
    "Qwen2-0.5B": (494_032_768, 151936, 896, True),
    "Qwen2.5-0.5B": (494_032_768, 151936, 896, True),
    "Qwen2.5-1.5B": (1_543_714_304, 151936, 1536, True),
    "Qwen2.5-3B": (3_085_938_688, 151936, 2048, True),
    "Qwen2.5-7B": (7_615_616_512, 152064, 3584, False),
    "Qwen2.5-14B": (14_770_033_664, 152064, 5120, False),
    "Qwen2.5-32B": (32_763_876_352, 152064, 5120, False),
    "Qwen2.5-72B": (72_706_203_648, 152064, 8192, False),
    "Qwen3-0.6B": (596_049_920, 151936, 1024, True),
    "Qwen3-1.7B": (1_720_574_976, 151936, 2048, True),
    "Qwen3-4B": (4_022_468_096, 151936, 2560, True),
    "Qwen3-8B": (8_190_735_360, 151936, 4096, False),
    "Qwen3-14B": (14_768_307_200, 151936, 5120, False),
    "Qwen3-32B": (32_762_123_264, 151936, 5120, False),
    "Qwen3-30B-A3B": (30_532_122_624, 151936, 2048, False),
    "Qwen3-235B-A22B": (235_093_634_560, 151936, 4096, False),
    "gpt-oss-20b": (20_914_757_184, 201088, 2880, False),
}


@pytest.mark.parametrize("name", _CHATS)
def test_language_model_is_the_base_with_other_rows_and_its_own_head(name: str) -> None:
    release = find(name)
    # "Qwen2.5-3B" is not a prefix of "Qwen2.5-32B-Instruct".
    total, rows, width, tied = _BASES[max((b for b in _BASES if re.match(rf"{b}(\b|-)", release.llm)), key=len)]
    body = total - (1 if tied else 2) * rows * width
    assert _counts(name)["language_model"] == body + 2 * release.language_model["vocab_size"] * width


def test_counting_allocates_nothing_and_leaves_the_configuration_alone() -> None:
    config = find("InternVL3_5-241B-A28B").config()
    before = config.to_json_string()
    counts = parameter_count(config)
    assert counts["total"] == sum(counts[part] for part in ("vision", "projector", "language_model"))
    assert config.to_json_string() == before


def test_a_tied_head_counts_once() -> None:
    config = find("InternVL2_5-1B").config()
    config.llm_config.tie_word_embeddings = True
    rows = _counts("InternVL2_5-1B")["language_model"] - parameter_count(config)["language_model"]
    assert rows == 151_674 * 896


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("OpenGVLab/InternVL3-8B", "InternVL3-8B"),
        ("internvl3-8b", "InternVL3-8B"),
        ("InternVL3-8B-Instruct", "InternVL3-8B"),
        ("InternVL3-8B-hf", "InternVL3-8B"),
        ("OpenGVLab/InternVL3_5-8B-MPO-HF", "InternVL3_5-8B"),
        ("InternVL3.5-30B-A3B-Flash", "InternVL3_5-30B-A3B"),
        ("InternVL2.5-4B", "InternVL2_5-4B"),
        ("InternVL2_5-4B-MPO", "InternVL2_5-4B-MPO"),
        ("InternVL2-8B-MPO", "InternVL2-8B"),
        ("./models/InternVL2-26B-AWQ/", "InternVL2-26B"),
        ("InternVL-Chat-Chinese-V1-1", "InternVL-Chat-V1-1"),
        ("Mini-InternVL2-2B-DA-Medical", "InternVL2-2B"),
        ("InternVL3_5-20B-A4B", "InternVL3_5-GPT-OSS-20B-A4B-Preview"),
        ("opengvlab/internvit-300m-448px-v2.5", "InternViT-300M-448px-V2_5"),
    ],
)
def test_find(asked: str, name: str) -> None:
    assert find(asked).name == name


def test_every_repository_is_found_and_belongs_to_one_release() -> None:
    owners: dict[str, str] = {}
    for release in releases():
        for spelling in (*release.hub_ids, *release.aliases):
            assert find(spelling) is release
            assert owners.setdefault(spelling.lower(), release.name) == release.name
    assert "OpenGVLab/InternVL3-8B-Instruct" in find("InternVL3-8B").hub_ids
    # The two largest models of 3.5 and the preview have no compressed variant.
    assert not [i for i in find("InternVL3_5-241B-A28B").hub_ids if i.endswith("Flash")]


def test_unknown_names_list_the_closest() -> None:
    with pytest.raises(UnknownReleaseError, match="called 'OpenGVLab/InternVL3-7B'.*InternVL3-"):
        find("OpenGVLab/InternVL3-7B")
    with pytest.raises(UnknownReleaseError, match="internvl describe"):
        find("zzz")
    assert issubclass(UnknownReleaseError, ValueError)


# --------------------------------------------------------------------------------------------------------- recognition

# Releases that no configuration can tell apart.
_EQUAL = [
    {"InternViT-6B-448px-V1-2", "InternViT-6B-448px-V1-5", "InternViT-6B-448px-V2_5"},
    {"InternViT-300M-448px", "InternViT-300M-448px-V2_5"},
    {"InternVL-Chat-V1-2", "InternVL-Chat-V1-2-Plus"},
    {"InternVL-Chat-V1-5", "InternVL2-26B"},
    {"Mini-InternVL-Chat-2B-V1-5", "InternVL2-2B"},
    {"Mini-InternVL-Chat-4B-V1-5", "InternVL2-4B"},
    *({f"InternVL2_5-{size}B", f"InternVL2_5-{size}B-MPO"} for size in (1, 2, 4, 8, 26, 38, 78)),
]


@pytest.mark.parametrize("name", _NAMES)
def test_each_release_is_recognised_after_a_json_round_trip(name: str) -> None:
    config = find(name).config()
    for form in (config, json.loads(config.to_json_string(use_diff=False)), json.loads(config.to_json_string())):
        found = identify(form)
        exact = {release.name for release in found if not differences(form, release)}
        assert exact == next((group for group in _EQUAL if name in group), {name})
        assert found[0].name in exact


def _native(text: dict[str, Any], vision: dict[str, Any] | None = None, token: int = 151667) -> InternVLConfig:
    """A configuration of transformers' own class, written from the released -hf files' fields."""
    return InternVLConfig(
        text_config={"tie_word_embeddings": False, **text},
        vision_config={"attention_bias": True, **(vision or {})},
        image_token_id=token,
        tie_word_embeddings=False,
    )


_DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
_VISION_6B = {
    "hidden_size": 3200,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "attention_bias": False,
    "use_qk_norm": True,
    "norm_type": "rms_norm",
}


def _text(kind: str, sizes: tuple[int, int, int, int, int], rows: int, **more: Any) -> dict[str, Any]:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    return {
        "model_type": kind,
        "vocab_size": rows,
        "rms_norm_eps": 1e-6,
        **dict(zip(names, sizes, strict=True)),
        **more,
    }


def _qwen2(sizes: tuple[int, int, int, int, int]) -> dict[str, Any]:
    return _text(
        "qwen2", sizes, 151674, max_position_embeddings=32768, rope_parameters={**_DYNAMIC, "rope_theta": 1e6}
    )


def _qwen3(kind: str, sizes: tuple[int, int, int, int, int], **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return _text(kind, sizes, 151936, head_dim=128, max_position_embeddings=40960, rope_parameters=rope, **more)


_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
_GPT_OSS = {
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "original_max_position_embeddings": 4096, "truncate": False,
    },
}  # fmt: skip
_INTERNLM3 = {
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "dynamic", "factor": 6.0, "rope_theta": 5e7},
}
_NATIVE = {
    "InternVL3-1B": (_qwen2((896, 24, 14, 2, 4864)), {}, 151667),
    "InternVL3-8B": (_qwen2((3584, 28, 28, 4, 18944)), {}, 151667),
    "InternVL3-9B": (_text("llama", (4096, 48, 32, 2, 10240), 128521, **_INTERNLM3), {}, 128514),
    "InternVL3-38B": (_qwen2((5120, 64, 40, 8, 27648)), _VISION_6B, 151667),
    "InternVL3_5-4B": (_qwen3("qwen3", (2560, 36, 32, 8, 9728)), {}, 151671),
    "InternVL3_5-30B-A3B": (_qwen3("qwen3_moe", (2048, 48, 32, 4, 6144), **_EXPERTS), {}, 151671),
    "InternVL3_5-GPT-OSS-20B-A4B-Preview": (_text("gpt_oss", (2880, 24, 64, 8, 2880), 200028, **_GPT_OSS), {}, 200021),
}


@pytest.mark.parametrize("name", _NATIVE)
def test_native_layout_is_recognised_and_counts_the_same(name: str) -> None:
    config = _native(*_NATIVE[name])
    for form in (config, json.loads(config.to_json_string())):
        found = identify(form)
        assert found[0].name == name
        assert differences(form, found[0]) == {}
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
    assert sum(p.numel() for p in model.parameters()) == _counts(name)["total"]


def test_a_released_file_is_recognised() -> None:
    # The fields that InternVL3_5-8B's config.json holds; its language model has no tie_word_embeddings.
    values = {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "eos_token_id": 151645,
        "force_image_size": 448,
        "image_fold": None,
        "llm_config": {
            "_name_or_path": "/root/Qwen3-8B",
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 12288,
            "max_position_embeddings": 40960,
            "max_window_layers": 36,
            "model_type": "qwen3",
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "torch_dtype": "bfloat16",
            "use_cache": False,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": None,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "attention_dropout": 0.0,
            "drop_path_rate": 0.1,
            "hidden_act": "gelu",
            "hidden_size": 1024,
            "image_size": 448,
            "initializer_factor": 1.0,
            "intermediate_size": 4096,
            "layer_norm_eps": 1e-06,
            "model_type": "intern_vit_6b",
            "norm_type": "layer_norm",
            "num_attention_heads": 16,
            "num_channels": 3,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "qk_normalization": False,
            "qkv_bias": True,
            "use_flash_attn": True,
        },
    }
    found = identify(values)
    assert [release.name for release in found] == ["InternVL3_5-8B"]
    assert differences(values, found[0]) == {}


def test_names_inside_a_file_do_not_count() -> None:
    values = json.loads(find("InternVL3-2B").config().to_json_string())
    values["_name_or_path"] = "OpenGVLab/InternVL3-78B"
    values["llm_config"]["_name_or_path"] = "Qwen/Qwen2.5-72B"
    assert identify(values)[0].name == "InternVL3-2B"


def test_a_fine_tune_is_recognised_and_its_changes_named() -> None:
    config = find("InternVL2_5-8B").config()
    config.llm_config.vocab_size += 3
    config.max_dynamic_patch = 6
    config.force_image_size = 224
    found = identify(config)
    # An older model of the same shape, which differs in more.
    assert [release.name for release in found] == ["InternVL2_5-8B", "InternVL2_5-8B-MPO", "InternVL2-8B"]
    changed = {"vocab_size": (92556, 92553), "max_dynamic_patch": (6, 12), "image_size": (224, 448)}
    assert differences(config, found[0]) == changed
    assert differences(config, found[2]) == {**changed, "template": ("internvl2_5", "internlm2-chat")}
    text = describe(config)
    assert "max_dynamic_patch: 6 instead of 12" in text and "InternVL2-8B" in text


def test_one_changed_dimension_is_another_architecture() -> None:
    changes = {"llm_config": "num_hidden_layers", "vision_config": "num_hidden_layers"}
    for part, field in changes.items():
        config = find("InternVL3-8B").config()
        setattr(getattr(config, part), field, getattr(getattr(config, part), field) - 1)
        assert identify(config) == ()
        assert describe(config).startswith("No released architecture")


def test_an_unreleased_model_and_another_kind_of_model() -> None:
    tiny = chat_config()
    assert identify(tiny) == ()
    assert f"{tiny.llm_config.vocab_size} rows" in describe(tiny)
    with pytest.raises(UnknownReleaseError, match="'llava'"):
        identify({"model_type": "llava"})


# --------------------------------------------------------------------------------------------------------------- table


def test_table_has_no_unknown_keys_or_parts() -> None:
    table = yaml.safe_load((Path(families.__file__).parent / "families.yaml").read_text())
    used = {"source": set(), "encoder": set(), "llm": set(), "generation": set()}
    optional = {"date", "context", "llm", "variants", "also", "aliases", "settings", "uncertain", "notes"}
    for entry in table["releases"]:
        assert {"name", "generation", "encoder", "published", "source"} <= set(entry)
        assert set(entry) - optional == {"name", "generation", "encoder", "published", "source"}, entry["name"]
        for kind, names in used.items():
            names.add(entry.get(kind))
    assert used["source"] == set(table["sources"])
    assert used["encoder"] == set(table["encoders"])
    assert used["llm"] - {None} == set(table["language_models"])
    assert used["generation"] == set(table["generations"])


@pytest.mark.parametrize("name", _NAMES)
def test_facts_are_in_their_ranges(name: str) -> None:
    release = find(name)
    assert datetime.date(2023, 12, 1) < datetime.date.fromisoformat(release.date) < datetime.date(2026, 1, 1)
    if release.is_encoder:
        return
    config = release.config()
    assert isinstance(config, InternVLChatConfig)
    assert config.template in template_names()
    assert config.tokens_per_tile(1) == [256]
    assert set(InternVLChatConfig().to_dict()) >= set(release.settings)
    assert config.vision_config.to_dict() == find(release.encoder).config().to_dict()


@pytest.mark.parametrize("name", _CHATS)
def test_added_tokens_are_the_last_of_their_tokenizer(name: str) -> None:
    release = find(name)
    added = [release.tokens[key] for key in ("img", "end_img", "img_context", "quad", "ref", "box")]
    ids = [i for item in added for i in (item if isinstance(item, list) else [item]) if i is not None]
    if not ids:
        assert release.config().img_context_token_id is None
        return
    assert ids == list(range(ids[0], ids[0] + len(ids))) and len(ids) in (7, 9)
    rows = release.language_model["vocab_size"]
    # Qwen3 keeps the rows that it is padded to, the others are cut to the tokenizer's length.
    assert (rows == 151936 and ids[-1] < rows) if "Qwen3" in release.llm else ids[-1] == rows - 1


_TILED = (True, True, 12)


@pytest.mark.parametrize(
    ("name", "template", "shuffle", "layer", "tiling", "rope"),
    [
        ("InternVL-Chat-V1-1", "internvl_zh", "v1", -4, (False, False, None), (1e4, "default", None)),
        ("InternVL-Chat-V1-2-Plus", "Hermes-2", "v1", -1, (False, False, None), (5e6, "default", None)),
        ("InternVL-Chat-V1-5", "internlm2-chat", "v2", -1, _TILED, (1e6, "dynamic", 3.0)),
        ("Mini-InternVL-Chat-4B-V1-5", "phi3-chat", "v2", -1, _TILED, (1e4, "default", None)),
        ("InternVL2-1B", "Hermes-2", "v2", -1, _TILED, (1e6, "default", None)),
        ("InternVL2-8B", "internlm2-chat", "v2", -1, _TILED, (1e6, "dynamic", 2.0)),
        ("InternVL2-40B", "Hermes-2", "v2", -1, _TILED, (5e6, "default", None)),
        ("InternVL2-Llama3-76B", "internlm2-chat", "v2", -1, _TILED, (5e5, "default", None)),
        ("InternVL2_5-2B", "internvl2_5", "v2", -1, _TILED, (1e6, "dynamic", 2.0)),
        ("InternVL2_5-26B-MPO", "internvl2_5", "v2", -1, _TILED, (5e7, "dynamic", 2.5)),
        ("InternVL2_5-78B", "internvl2_5", "v2", -1, _TILED, (1e6, "default", None)),
        ("InternVL3-78B", "internvl2_5", "v2", -1, _TILED, (1e6, "dynamic", 2.0)),
        ("InternVL3_5-241B-A28B", "internvl2_5", "v2", -1, _TILED, (1e6, "default", None)),
        ("InternVL3_5-GPT-OSS-20B-A4B-Preview", "internvl3_5_gpt_oss", "v2", -1, _TILED, (1.5e5, "yarn", 32.0)),
    ],
)
def test_settings_as_documented(
    name: str, template: str, shuffle: str, layer: int, tiling: tuple[Any, ...], rope: tuple[Any, ...]
) -> None:
    config = find(name).config()
    assert (config.template, config.ps_version, config.select_layer) == (template, shuffle, layer)
    assert (config.dynamic_image_size, config.use_thumbnail) == tiling[:2]
    assert tiling[2] in (None, config.max_dynamic_patch)
    found = config.llm_config.rope_parameters
    assert (found["rope_theta"], found.get("rope_type", "default"), found.get("factor")) == rope


def test_the_image_token_is_the_one_transformers_knows() -> None:
    assert find("InternVL3-1B").tokens["img_context"] == InternVLConfig().image_token_id


def test_configurations_are_fresh() -> None:
    release = find("InternVL3-8B")
    release.config().llm_config.rope_parameters["factor"] = 99.0
    assert release.config().llm_config.rope_parameters["factor"] == 2.0


# --------------------------------------------------------------------------------------------------------- description


@pytest.mark.parametrize("name", ["InternVL3-8B", "InternVL3-9B", "InternVL3_5-30B-A3B", "InternViT-6B-224px"])
def test_description(name: str) -> None:
    release: Release = find(name)
    text = describe(release)
    words = " ".join(text.split())
    assert text.startswith(name) and release.date in text
    assert f"{_counts(name)['total']:,}" in text
    for fact in (release.encoder, release.llm or "", *release.hub_ids, *release.notes, release.published["total"]):
        assert fact in words
    assert max(map(len, text.splitlines())) <= 110


def test_description_of_special_tokens() -> None:
    assert "<IMG_CONTEXT> 151667, <quad> 151668, </quad> 151669" in describe(find("InternVL3-8B"))
    assert "not known: <img>, </img>, <IMG_CONTEXT>" in describe(find("InternVL3-9B"))


_UNUSABLE = [
    {"llm_config": "x"},
    {"vision_config": "x"},
    {"vision_config": {"hidden_size": "x"}},
    {"vision_config": {"num_attention_heads": 0}},
    {"llm_config": {"hidden_act": "no_such"}},
    {"llm_config": {"rope_scaling": {"rope_type": "no_such"}}},
    {"dtype": "float33"},
    {"max_dynamic_patch": [], "dynamic_image_size": True},
]


@pytest.mark.parametrize("change", _UNUSABLE, ids=[json.dumps(change) for change in _UNUSABLE])
def test_a_configuration_that_cannot_be_described_is_one_line(change: dict[str, Any]) -> None:
    values = chat_config("qwen2").to_dict()
    for name, value in change.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=r".") as caught:
        describe(values)
    assert "\n" not in str(caught.value).strip()


def test_table_of_all_has_one_aligned_row_each() -> None:
    head, *rows = describe_all().splitlines()
    assert [row.split()[0] for row in rows] == _NAMES
    start = head.index("template")
    assert rows[_NAMES.index("InternVL3-78B")][start:].startswith("internvl2_5")


def test_documentation_lists_every_release() -> None:
    text = (_ROOT / "docs" / "models.md").read_text()
    lines = text.splitlines()
    for release in releases():
        row = next((line for line in lines if line.startswith(f"| {release.name} ")), None)
        assert row is not None, release.name
        for fact in (release.date, release.published["total"], release.llm):
            if fact:
                assert fact in row, f"{fact} is not in the row of {release.name}"
        assert f"{_counts(release.name)['total']:,}" in row


def test_documentation_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (_ROOT / "docs" / "models.md").read_text(), re.MULTILINE | re.DOTALL)
    exec("\n".join(blocks), {})
    count, changed, *text = capsys.readouterr().out.splitlines()
    said = re.findall(r"^print\(.*\)  # (.+)$", "\n".join(blocks), re.MULTILINE)
    assert said == [count, changed]
    assert text[0] == "InternVL3-8B (2025-04-11)"
