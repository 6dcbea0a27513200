"""What once went wrong without an exception (transformers 4.37 to 5.23 under the original code), and must not again.

W1 `resize_token_embeddings` changed one end only: `test_new_tokens_can_be_read_and_said`; sizes, old values and saving
    in `test_loading_internvl_chat.py`, `test_resized_vocabulary_changes_both_ends_and_saves`
W2 weights that a file lacks stayed uninitialised memory: `test_a_missing_layer_is_initialised_and_reported`;
    `test_loading_internvl_chat.py`, `test_missing_weights_are_initialised`, `test_missing_encoder_is_alive`
W3 buffers that are not saved were garbage after loading: `test_a_loaded_model_computes_what_the_saved_one_did`;
    offloaded in `test_loading_internvl_chat.py`, `test_offload_to_disk_changes_nothing`
W4 spaces around special tokens changed: `conversion/test_tokenizers.py`, `test_internlm2_is_as_released`
W5 loaded weights were initialised again: `test_what_was_in_the_file_is_kept_where_its_neighbour_was_not`
W6 the second load could not generate: `test_every_load_of_a_remote_class_can_generate`; the class itself in
    `test_generation_internvl_chat.py`, `test_second_load_can_still_generate`
W7 transformers 4 read saved files wrongly: `test_saved_configuration_has_the_fields_of_a_released_one` and those after
    it; `test_configuration_internvl_chat.py`, `test_rope_theta_is_written_for_transformers_4` and the two after it;
    `test_language_models.py`, `test_experts_are_saved_one_by_one`
W8 `AutoProcessor` returned the tokenizer: `test_upload_to_hub.py`, `test_fixture_checkpoint_loads_on_its_own`;
    `test_processing_internvl.py`, `test_remote_processor`
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CHAT, CONTEXT, QWEN2, VOCABULARY, assert_same, chat_config, llm_dict, load
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from internvl_hub.configuration_internvl_chat import InternVLChatConfig
from internvl_hub.image_processing_internvl import InternVLImageProcessor
from internvl_hub.modeling_internvl_chat import InternVLChatModel
from internvl_hub.processing_internvl import InternVLProcessor
from internvl_hub.upload_to_hub import gather

BACKBONES = ("qwen2", "qwen3", "qwen3_moe", "gpt_oss", "internlm2", "llama", "phi3", "qwen2-tied")
EACH = pytest.mark.parametrize("backbone", BACKBONES)
GREEDY = {"max_new_tokens": 3, "do_sample": False}


@pytest.fixture
def _poisoned_memory() -> Iterator[None]:
    """Uninitialised memory is NaN, where it usually is zero by luck."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills it
    assert torch.empty(1000).isnan().all() and torch.empty_like(torch.ones(3)).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


poisoned = pytest.mark.usefixtures("_poisoned_memory")


def _model(backbone: str) -> InternVLChatModel:
    model_type, _, tied = backbone.partition("-")
    return InternVLChatModel(chat_config(llm_config=llm_dict(model_type, tie_word_embeddings=bool(tied)))).eval()


def _inputs() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[3, 9, *[CONTEXT] * 4, 10, 40, 41, 42]])
    return {"input_ids": ids, "pixel_values": torch.ones(1, 3, 56, 56)}


# -------------------------------------------------------------------------------------------------- W1: new vocabulary


@poisoned
@EACH
@torch.no_grad()
def test_new_tokens_can_be_read_and_said(backbone: str, tmp_path: Path) -> None:
    """The last new token gets the output row that answers the prompt, so the model must say it and read it on."""
    model, inputs, new = _model(backbone), _inputs(), VOCABULARY + 6
    answer = model.base_model(**inputs).last_hidden_state[0, -1]
    model.resize_token_embeddings(VOCABULARY + 7)
    assert model.get_input_embeddings().weight.isfinite().all() and model.lm_head.weight.isfinite().all()
    model.lm_head.weight[new] = 10 * answer
    output = model.generate(**inputs, **GREEDY)
    assert output[0, inputs["input_ids"].shape[1]] == new
    assert torch.equal(model.generate(**inputs, **GREEDY, use_cache=False), output)
    model.save_pretrained(tmp_path)
    assert torch.equal(InternVLChatModel.from_pretrained(tmp_path).generate(**inputs, **GREEDY), output)


# -------------------------------------------------------------------------------- W2, W5: files that lack some weights


def _load_without(
    model: InternVLChatModel, dropped: Callable[[str, set[str]], bool], folder: Path
) -> tuple[InternVLChatModel, set[str]]:
    """The model from a file without the tensors that `dropped(name, all names)` chooses; what was reported missing."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not dropped(name, set(tensors))}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    loaded, info = InternVLChatModel.from_pretrained(folder, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    return loaded, set(info["missing_keys"])


def _assert_kept(loaded: InternVLChatModel, model: InternVLChatModel, missing: set[str]) -> None:
    before, after = model.state_dict(), loaded.state_dict()
    kept = before.keys() - missing
    assert_same({name: after[name] for name in kept}, {name: before[name] for name in kept})


LOST = ("language_model.model.layers.1.", "language_model.model.norm.", "vision_model.encoder.layers.1.", "mlp1.")


@poisoned
@EACH
def test_a_missing_layer_is_initialised_and_reported(backbone: str, tmp_path: Path) -> None:
    """Matrices, biases, norms and bare parameters (experts, sinks, layer scales) of every kind of layer."""
    model = _model(backbone)
    for parameter in model.parameters():
        parameter.data.add_(7.0)  # so that no loaded weight looks like a fresh one
    loaded, missing = _load_without(model, lambda name, _: name.startswith(LOST), tmp_path)
    assert missing == {name for name in model.state_dict() if name.startswith(LOST)}
    _assert_kept(loaded, model, missing)
    state = loaded.state_dict()
    for name in missing:
        value, place = state[name], name.rsplit(".", 2)[-2]
        if name.endswith("bias") and place != "router":  # GPT-OSS draws the router's
            assert not value.any(), name
        elif "norm" in place or name == "mlp1.0.weight":
            assert (value == 1).all(), name
        elif name.endswith((".ls1", ".ls2")):
            assert (value == 0.1).all(), name
        else:  # both towers have `initializer_range` 0.2; few numbers do not show it
            assert 0 < value.abs().max() < 1.5, name
            assert value.numel() < 100 or value.std().item() == pytest.approx(0.2, rel=0.2), name
    assert loaded.train()(**_inputs(), labels=_inputs()["input_ids"]).loss.isfinite()


def _bias(name: str, names: set[str]) -> bool:
    return name.endswith("bias")


def _beside_a_bias(name: str, names: set[str]) -> bool:
    return f"{name}_bias" in names or (name.endswith("weight") and f"{name.removesuffix('weight')}bias" in names)


def _bare(name: str, names: set[str]) -> bool:
    expert = ".experts." in name and name.endswith(("down_proj", "down_proj.weight"))
    return expert or name.endswith(("ls1", "class_embedding", "sinks"))


@poisoned
@pytest.mark.parametrize("dropped", [_bias, _beside_a_bias, _bare])
@pytest.mark.parametrize("backbone", ["qwen2", "qwen3_moe", "gpt_oss", "internlm2"])
def test_what_was_in_the_file_is_kept_where_its_neighbour_was_not(
    backbone: str, dropped: Callable[[str, set[str]], bool], tmp_path: Path
) -> None:
    """One tensor of a module is missing: it is initialised, the others are those of the file, to the bit."""
    model = _model(backbone)
    for parameter in model.parameters():
        parameter.data.add_(torch.rand_like(parameter))
    loaded, missing = _load_without(model, dropped, tmp_path)
    siblings = {name.rsplit(".", 1)[0] for name in missing}
    assert [name for name in model.state_dict().keys() - missing if name.rsplit(".", 1)[0] in siblings]
    _assert_kept(loaded, model, missing)
    assert all(bool(loaded.state_dict()[name].isfinite().all()) for name in missing)


# ------------------------------------------------------------------------------------------------- W3: unsaved buffers


@poisoned
@EACH
def test_a_loaded_model_computes_what_the_saved_one_did(backbone: str, tmp_path: Path) -> None:
    """Short prompts, and prompts beyond the trained length, where dynamic and long rope compute other angles."""
    model = _model(backbone)
    model.save_pretrained(tmp_path)
    loaded = InternVLChatModel.from_pretrained(tmp_path)
    assert_same(dict(loaded.named_buffers()), dict(model.named_buffers()))
    for length in (9, 300, 9):
        ids = torch.randint(20, 400, (1, length))
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    inputs = _inputs()
    losses = [each.train()(**inputs, labels=inputs["input_ids"]).loss for each in (loaded, model)]
    assert losses[0].isfinite() and torch.equal(*losses)


# ------------------------------------------------------------------------------------------------ W6: loading it twice


def test_every_load_of_a_remote_class_can_generate(tmp_path: Path) -> None:
    """transformers gives a remote class its `generate` at the first load only."""
    gather(CHAT / QWEN2, tmp_path / "loaded_twice")
    inputs = _inputs()
    expected = load(QWEN2).generate(**inputs, **GREEDY)
    for auto in (AutoModel, AutoModel, AutoModelForCausalLM):
        model = auto.from_pretrained(tmp_path / "loaded_twice", trust_remote_code=True).eval()
        assert type(model).__module__.startswith("transformers_modules.")
        assert model.can_generate() and model.generation_config is not None
        model.img_context_token_id = CONTEXT
        assert torch.equal(model.generate(**inputs, **GREEDY), expected)


# ------------------------------------------------------------------------------------------ W7: read by transformers 4


def test_saved_tokenizer_has_the_fields_that_version_4_reads(tmp_path: Path) -> None:
    """4.57 takes no list for `extra_special_tokens` and has no class `TokenizersBackend`; 5 reads the same tokens."""
    tokenizer = AutoTokenizer.from_pretrained(CHAT / QWEN2)
    InternVLProcessor(InternVLImageProcessor(image_size=56), tokenizer).save_pretrained(tmp_path / "processor")
    load(QWEN2).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    plain = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert isinstance(plain["extra_special_tokens"], list)
    shutil.copyfile(tmp_path / "processor" / "processor_config.json", tmp_path / "model" / "processor_config.json")
    gather(tmp_path / "model", tmp_path / "gathered")
    for folder in (tmp_path / "processor", tmp_path / "gathered"):
        values = json.loads((folder / "tokenizer_config.json").read_text())
        assert not isinstance(values.get("extra_special_tokens"), list)
        assert values["tokenizer_class"] == "PreTrainedTokenizerFast"
        again = PreTrainedTokenizerFast.from_pretrained(folder)
        text = "<img><IMG_CONTEXT></img> a b<|im_end|>"
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert set(again.all_special_tokens) == set(tokenizer.all_special_tokens)


def _saved(config: InternVLChatConfig, folder: Path) -> dict[str, Any]:
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("backbone", [name for name in BACKBONES if "-" not in name])
def test_saved_configuration_has_the_fields_of_a_released_one(backbone: str, tmp_path: Path) -> None:
    """Under the names that transformers 4 reads: 5 renames the number of experts and everything about rope."""
    written = _saved(chat_config(backbone), tmp_path)["llm_config"]
    for name, value in llm_dict(backbone).items():
        if name == "rope_scaling":  # one name for the type in place of three
            kind = value.get("rope_type", value.get("type")).replace("su", "longrope")
            rest = {key: x for key, x in value.items() if key not in ("type", "rope_type")}
            assert written[name] == {"type": kind, **rest}
        else:
            assert written[name] == value, name
    assert (
        written["rope_theta"] == InternVLChatConfig.from_pretrained(tmp_path).llm_config.rope_parameters["rope_theta"]
    )


def test_partial_rotation_is_written(tmp_path: Path) -> None:
    """As of Phi-4-mini; transformers 4 would rotate every channel."""
    config = chat_config(llm_config=llm_dict("phi3", rope_scaling=None, partial_rotary_factor=0.75))
    assert _saved(config, tmp_path)["llm_config"]["partial_rotary_factor"] == 0.75
    rope = InternVLChatConfig.from_pretrained(tmp_path).llm_config.rope_parameters
    assert rope["partial_rotary_factor"] == 0.75


def test_precision_is_written_under_both_names(tmp_path: Path) -> None:
    """transformers before 4.56, and programs on top of it, know `torch_dtype` only."""
    load(QWEN2, dtype=torch.bfloat16).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    for part in (written, written["vision_config"], written["llm_config"]):
        assert part["torch_dtype"] == part["dtype"] == "bfloat16"
    again = InternVLChatModel.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
