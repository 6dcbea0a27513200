"""Configuration: every backend round-trips, released files are read with all leftovers, what is saved is clean."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny import CHAT, CHECKPOINTS, LLAMA, QWEN2, chat_config, llm_dict, vision_dict
from transformers import CONFIG_MAPPING, LlamaConfig, Qwen2Config

from internvl_hub.configuration_intern_vit import InternVisionConfig
from internvl_hub.configuration_internvl_chat import InternVLChatConfig, language_model_type

BACKENDS = ("qwen2", "qwen3", "qwen3_moe", "llama", "phi3", "gpt_oss", "internlm2", "mistral", "gemma2")
DEAD_VISION = {
    "capacity_factor": 1.2,
    "ep_size": 1,
    "eval_capacity_factor": 1.4,
    "laux_allreduce": "all_nodes",
    "moe_coeff_ratio": 0.5,
    "moe_intermediate_size": 768,
    "moe_output_scale": 4.0,
    "noisy_gate_policy": "RSample_before",
    "num_experts": 8,
    "num_routed_experts": 4,
    "num_shared_experts": 4,
    "shared_expert_intermediate_size": 3072,
    "use_moe": False,
    "use_residual": True,
    "use_rts": False,
    "use_weighted_residual": False,
    "use_flash_attn": True,
    "attn_implementation": "flash_attention_2",
    "_attn_implementation": "flash_attention_2",
    "_name_or_path": "./pretrained/InternViT",
    "initializer_range": 1e-10,
}
DEAD_LLM = {
    "attn_implementation": "flash_attention_2",
    "_attn_implementation": "flash_attention_2",
    "_attn_implementation_autoset": True,
    "_name_or_path": "./pretrained/Qwen2.5-32B-Instruct",
    "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
    "moe_config": None,
}


def _released(**changes: Any) -> dict[str, Any]:
    """The configuration of a fixture, with every leftover that released InternVL3 files carry."""
    values = json.loads((CHAT / QWEN2 / "config.json").read_text())
    values["vision_config"].update(DEAD_VISION)
    values["llm_config"].update(DEAD_LLM)
    return {
        **values,
        "image_fold": None,
        "system_message": None,
        "_attn_implementation": "flash_attention_2",
        **changes,
    }


def _write(folder: Path, values: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def _saved(config: InternVLChatConfig, folder: Path) -> dict[str, Any]:
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def _keys(values: Any) -> set[str]:
    if not isinstance(values, dict):
        return set()
    return set(values).union(*(_keys(value) for value in values.values()))


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("select_layer", "x", "an integer, got 'x'"),
        ("select_layer", True, "an integer, got True"),
        ("min_dynamic_patch", 0, "an integer of at least 1, got 0"),
        ("max_dynamic_patch", None, "an integer of at least 1, got None"),
        ("force_image_size", -448, "an integer of at least 0 or null, got -448"),
        ("force_image_size", 448.0, "an integer of at least 0 or null, got 448.0"),
        ("img_context_token_id", "x", "an integer of at least 0 or null, got 'x'"),
        ("downsample_ratio", 0, "a number above 0 and up to 1, got 0"),
        ("downsample_ratio", float("nan"), "a number above 0 and up to 1, got nan"),
        ("use_thumbnail", "no", "true or false, got 'no'"),
        ("dynamic_image_size", None, "true or false, got None"),
        ("pad2square", 1, "true or false, got 1"),
        ("template", [], "a text or null, got []"),
        ("system_message", 3, "a text or null, got 3"),
    ],
)
def test_values_that_no_code_can_use_are_refused(field: str, value: Any, wanted: str, tmp_path: Path) -> None:
    folder = _write(tmp_path, _released(**{field: value}))
    with pytest.raises(ValueError, match=re.escape(f"{field} must be {wanted}.")):
        InternVLChatConfig.from_pretrained(folder)


def test_a_tile_range_without_tiles_is_refused() -> None:
    with pytest.raises(ValueError, match="min_dynamic_patch 9 exceeds max_dynamic_patch 6"):
        InternVLChatConfig(**_released(min_dynamic_patch=9, max_dynamic_patch=6))


def test_a_forced_size_of_nothing_is_no_forced_size() -> None:
    values = _released(force_image_size=0)
    assert InternVLChatConfig(**values).image_size == values["vision_config"]["image_size"]


# ---------------------------------------------------------------------------------------------------------- round trip


def test_default_constructible(tmp_path: Path) -> None:
    config = InternVLChatConfig()
    assert config.llm_config.model_type == "qwen2"
    assert config.vision_config.num_hidden_layers == 48
    assert "internvl_chat" in repr(config)
    config.save_pretrained(tmp_path)
    assert InternVLChatConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize("backend", BACKENDS)
def test_round_trips(backend: str, tmp_path: Path) -> None:
    config = chat_config(backend, select_layer=-4, ps_version="v1", max_dynamic_patch=7)
    config.save_pretrained(tmp_path)
    for other in (InternVLChatConfig.from_dict(config.to_dict()), InternVLChatConfig.from_pretrained(tmp_path)):
        assert other.to_dict() == config.to_dict()
        assert type(other.llm_config) is type(config.llm_config)
        assert (other.select_layer, other.ps_version, other.max_dynamic_patch) == (-4, "v1", 7)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "internlm2"])
def test_language_config_is_what_transformers_reads(backend: str) -> None:
    """Field by field, `llm_config` is what transformers' own class makes of the same dictionary."""
    values = llm_dict(backend)
    if backend == "phi3":
        values["rope_scaling"] = {**values["rope_scaling"], "type": "longrope"}
    own = chat_config(backend).llm_config.to_dict()
    reference = CONFIG_MAPPING[backend](**{k: v for k, v in values.items() if k != "model_type"}).to_dict()
    assert own == reference


def test_internlm2_is_a_llama_with_dynamic_rope() -> None:
    own = chat_config("internlm2").llm_config
    fields = {k: v for k, v in llm_dict("internlm2").items() if k not in ("model_type", "architectures")}
    reference = LlamaConfig(**fields)
    assert isinstance(own, LlamaConfig)
    assert own.rope_parameters == reference.rope_parameters
    assert own.rope_parameters["rope_type"] == "dynamic" and own.rope_parameters["rope_theta"] == 1e6
    assert own.architectures == ["InternLM2ForCausalLM"]


def test_su_rope_becomes_longrope() -> None:
    rope = chat_config("phi3").llm_config.rope_parameters
    assert rope["rope_type"] == "longrope"
    assert rope["long_factor"] == [1.5, 2.0, 3.0, 4.0]


def test_arguments_are_not_changed() -> None:
    values = _released()
    before = copy.deepcopy(values)
    InternVLChatConfig.from_dict(values)
    assert values == before
    llm, vision = llm_dict("phi3"), vision_dict()
    InternVLChatConfig(vision_config=vision, llm_config=llm)
    assert (llm, vision) == (llm_dict("phi3"), vision_dict())


def test_configuration_objects_are_accepted() -> None:
    llm, vision = Qwen2Config(hidden_size=64), InternVisionConfig(hidden_size=50, num_attention_heads=5)
    config = InternVLChatConfig(vision_config=vision, llm_config=llm)
    assert (config.llm_config, config.vision_config, config.hidden_size) == (llm, vision, 64)


# ------------------------------------------------------------------------------------------------------ released files


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_original_files_load(name: str) -> None:
    raw = json.loads((CHAT / name / "config.json").read_text())
    config = InternVLChatConfig.from_pretrained(CHAT / name)
    for key in ("select_layer", "ps_version", "template", "force_image_size", "use_thumbnail", "max_dynamic_patch"):
        assert getattr(config, key) == raw[key], key
    for key in ("hidden_size", "vocab_size", "num_key_value_heads", "eos_token_id"):
        assert getattr(config.llm_config, key) == raw["llm_config"][key], key
    for key in ("hidden_size", "qk_normalization", "norm_type", "qkv_bias", "layer_norm_eps"):
        assert getattr(config.vision_config, key) == raw["vision_config"][key], key


def test_dead_keys_are_tolerated_and_not_written_again(tmp_path: Path) -> None:
    config = InternVLChatConfig.from_pretrained(_write(tmp_path, _released()))
    written = _saved(config, tmp_path / "out")
    dead = (DEAD_VISION.keys() | DEAD_LLM.keys()) - {"initializer_range", "auto_map", "moe_config", "_name_or_path"}
    assert not dead & _keys(written)
    assert "auto_map" not in written["llm_config"]
    assert not written["llm_config"].get("_name_or_path") and not written["vision_config"].get("_name_or_path")
    assert written["vision_config"]["initializer_range"] == 1e-10


def test_saved_flash_attention_does_not_reach_the_towers() -> None:
    config = InternVLChatConfig.from_dict(_released())
    assert config.llm_config._attn_implementation != "flash_attention_2"
    assert config.vision_config._attn_implementation != "flash_attention_2"


def test_vision_config_of_a_full_checkpoint() -> None:
    vision = InternVisionConfig.from_pretrained(CHAT / LLAMA)
    assert (vision.hidden_size, vision.num_hidden_layers, vision.norm_type) == (48, 6, "rms_norm")


# ----------------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("changes", [{"system_message": None}, {}], ids=["null", "missing"])
def test_null_system_message_is_a_missing_one(changes: dict[str, None], tmp_path: Path) -> None:
    config = chat_config(**changes)
    assert config.system_message is None
    assert "system_message" not in config.to_dict()
    assert "system_message" not in _saved(config, tmp_path)
    assert InternVLChatConfig.from_pretrained(tmp_path).system_message is None


def test_system_message_is_kept(tmp_path: Path) -> None:
    assert _saved(chat_config(system_message="Be brief."), tmp_path)["system_message"] == "Be brief."
    assert InternVLChatConfig.from_pretrained(tmp_path).system_message == "Be brief."


def test_no_null_that_the_original_code_would_trip_over(tmp_path: Path) -> None:
    """The original code reads these fields without asking whether they are None."""
    written = _saved(InternVLChatConfig(llm_config=llm_dict("internlm2"), force_image_size=448), tmp_path)
    for key in ("select_layer", "downsample_ratio", "ps_version", "use_llm_lora", "hidden_size", "max_dynamic_patch"):
        assert written[key] is not None, key
    vision, llm = written["vision_config"], written["llm_config"]
    assert None not in [vision[key] for key in ("norm_type", "image_size", "drop_path_rate", "qk_normalization")]
    assert None not in [
        llm[key] for key in ("architectures", "bias", "rope_theta", "num_key_value_heads", "rms_norm_eps")
    ]


@pytest.mark.parametrize("backend", ["qwen2", "qwen3", "qwen3_moe", "llama", "internlm2"])
def test_rope_theta_is_written_for_transformers_4(backend: str, tmp_path: Path) -> None:
    assert _saved(chat_config(backend), tmp_path)["llm_config"]["rope_theta"] == llm_dict(backend)["rope_theta"]


def test_rope_scaling_is_written_for_transformers_4(tmp_path: Path) -> None:
    """In the exact form that its validation (InternLM2: two fields; Phi-3: three) accepts."""
    internlm2 = _saved(chat_config("internlm2"), tmp_path / "a")["llm_config"]["rope_scaling"]
    phi3 = _saved(chat_config("phi3"), tmp_path / "b")["llm_config"]
    assert internlm2 == {"type": "dynamic", "factor": 2.0}
    assert phi3["rope_scaling"] == {**llm_dict("phi3")["rope_scaling"], "type": "longrope"}
    assert phi3["original_max_position_embeddings"] == 128
    assert "rope_scaling" not in _saved(chat_config("qwen2"), tmp_path / "c")["llm_config"]


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(("backend", "rope"), [("llama", LLAMA3_ROPE), ("qwen3", YARN_ROPE), ("gpt_oss", YARN_ROPE)])
def test_scaled_rope_keeps_its_original_length_for_transformers_4(
    backend: str, rope: dict[str, Any], tmp_path: Path
) -> None:
    """transformers 4 fails (llama3) or scales from the wrong length (yarn) without it."""
    config = chat_config(backend, llm_config=llm_dict(backend, rope_scaling=dict(rope)))
    scaling = _saved(config, tmp_path)["llm_config"]["rope_scaling"]
    assert scaling["type"] == rope["rope_type"]
    assert {key: scaling[key] for key in rope if key != "rope_type"} == {
        k: v for k, v in rope.items() if k != "rope_type"
    }


def test_rope_scaling_added_by_hand_to_a_saved_file_counts(tmp_path: Path) -> None:
    """As the cards of the Qwen models tell users to do for long prompts."""
    written = _saved(chat_config("qwen2"), tmp_path)
    written["llm_config"]["rope_scaling"] = dict(YARN_ROPE)
    rope = InternVLChatConfig.from_pretrained(_write(tmp_path, written)).llm_config.rope_parameters
    assert rope["rope_type"] == "yarn" and rope["factor"] == 4.0 and rope["rope_theta"] == 1e6


def test_auto_map_is_complete(tmp_path: Path) -> None:
    config = InternVLChatConfig.from_pretrained(CHAT / QWEN2)
    auto_map = _saved(config, tmp_path)["auto_map"]
    assert auto_map["AutoConfig"] == "configuration_internvl_chat.InternVLChatConfig"
    for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"):
        assert auto_map[name] == "modeling_internvl_chat.InternVLChatModel"


# ---------------------------------------------------------------------------------------------------------- properties


def test_text_config_is_the_language_model() -> None:
    config = chat_config()
    assert config.get_text_config() is config.llm_config
    assert config.get_text_config(decoder=True) is config.llm_config


@pytest.mark.parametrize(
    ("size", "patch", "ratio", "tokens"),
    [(448, 14, 0.5, 256), (224, 14, 0.5, 64), (448, 14, 0.25, 64), (336, 14, 0.5, 144)],
)
def test_tokens_per_tile(size: int, patch: int, ratio: float, tokens: int) -> None:
    vision = vision_dict(image_size=448, patch_size=patch)
    config = chat_config(vision_config=vision, force_image_size=size, downsample_ratio=ratio)
    assert config.tokens_per_tile(3) == [tokens] * 3
    assert config.tokens_per_tile(0) == []


def test_image_size_falls_back_to_the_encoder() -> None:
    assert chat_config(force_image_size=None).image_size == 56
    assert chat_config(force_image_size=112).image_size == 112


@pytest.mark.parametrize("tied", [True, False])
def test_tie_flag_follows_the_language_model(tied: bool, tmp_path: Path) -> None:
    """Released files say the opposite at the top at times: the language model's own flag is the true one."""
    config = chat_config(llm_config=llm_dict("qwen2", tie_word_embeddings=tied), tie_word_embeddings=not tied)
    assert config.tie_word_embeddings is tied
    assert _saved(config, tmp_path)["tie_word_embeddings"] is tied
    assert InternVLChatConfig.from_pretrained(tmp_path).llm_config.tie_word_embeddings is tied


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("llm", "found"),
    [
        ({"architectures": ["MambaWhatForCausalLM"]}, "MambaWhatForCausalLM"),
        ({"model_type": "no_such_model"}, "no_such_model"),
        ({"model_type": "vit"}, "no causal language model"),
        ({"architectures": [""], "model_type": ""}, "Qwen2ForCausalLM"),
    ],
)
def test_unknown_language_models_are_named(llm: dict[str, Any], found: str) -> None:
    with pytest.raises(ValueError, match=found):
        InternVLChatConfig(llm_config=llm)


@pytest.mark.parametrize(
    ("llm", "model_type"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "qwen2"),
        ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen2"}, "qwen3"),
        ({"model_type": "llama"}, "llama"),
        ({"architectures": ["InternLM2ForCausalLM"]}, "internlm2"),
        ({"model_type": "internlm2", "architectures": None}, "internlm2"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "qwen3_moe"),
        ({"architectures": ["GptOssForCausalLM"]}, "gpt_oss"),
    ],
)
def test_architecture_decides_and_model_type_stands_in(llm: dict[str, Any], model_type: str) -> None:
    assert language_model_type(llm) == model_type


def test_wrong_kind_of_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'llava'.*'internvl_chat'"):
        InternVLChatConfig.from_pretrained(_write(tmp_path, {"model_type": "llava"}))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: chat_config(ps_version="v3"), "ps_version"),
        (lambda: InternVisionConfig(norm_type="batch_norm"), "norm_type"),
        (lambda: InternVisionConfig(hidden_size=10, num_attention_heads=3), "num_attention_heads"),
    ],
)
def test_bad_values_are_named(make: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()
