"""From arguments to a model: weights to the bit, rows of new tokens, overrides in model and processor alike."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    CHAT,
    CHECKPOINTS,
    END_OF_TURN,
    PHI3,
    QWEN2,
    assert_same,
    batch,
    expected,
    llm_dict,
    load,
    vision_6b_dict,
    vision_dict,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, set_seed
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from internvl_hub.configuration_intern_vit import InternVisionConfig
from internvl_hub.configuration_internvl_chat import build_llm_config
from internvl_hub.conversation import chat_template, get_template
from internvl_hub.conversion.convert import convert
from internvl_hub.modeling_intern_vit import InternVisionModel
from internvl_hub.modeling_internvl_chat import InternVLChatModel, build_language_model
from internvl_hub.processing_internvl import InternVLProcessor
from internvl_hub.training import quantization
from internvl_hub.training.arguments import ModelArguments
from internvl_hub.training.building import Built, build
from internvl_hub.training.vocabulary import SPECIAL_TOKENS

BACKBONES = ("qwen2", "qwen2-tied", "qwen3", "qwen3_moe", "gpt_oss", "internlm2", "llama", "phi3", "mistral", "gemma2")
# As training adds them (spec of the original, `internvl/train/constants.py`).
ORDER = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
OLD = 268  # size of the language model's own vocabulary
EMBED = "model.embed_tokens.weight"
TABLES = ("embed_tokens.weight", "tok_embeddings.weight", "lm_head.weight", "output.weight")  # the latter: InternLM2


def _save_tokenizer(folder: Path, *extra: str) -> None:
    """A byte-level tokenizer that knows nothing of images, but for `extra`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *extra]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=OLD, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["what is it? a cat and a hat"] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    assert len(fast) == OLD
    fast.save_pretrained(folder)


def _save_language_model(folder: Path, backbone: str = "qwen2", rows: int = 300, *extra: str, **dtype: Any) -> Path:
    """A language model alone, with a table of `rows` rows."""
    model_type, _, tied = backbone.partition("-")
    set_seed(0)
    config = build_llm_config(llm_dict(model_type, vocab_size=rows, tie_word_embeddings=bool(tied)))
    build_language_model(config).to(**dtype).save_pretrained(folder)
    _save_tokenizer(folder, *extra)
    return folder


def _save_encoder(folder: Path, **changes: Any) -> Path:
    set_seed(1)
    InternVisionModel(InternVisionConfig(**vision_dict(**changes))).save_pretrained(folder)
    return folder


def _parts(folder: Path, backbone: str = "qwen2", rows: int = 300, *extra: str, **arguments: Any) -> Built:
    llm, vision = _save_language_model(folder / "llm", backbone, rows, *extra), _save_encoder(folder / "vision")
    defaults = {"llm_path": str(llm), "vision_path": str(vision), "conv_style": "internvl2_5"}
    return build(ModelArguments(**{**defaults, **arguments}))


def _checkpoint(name: str = QWEN2, **arguments: Any) -> Built:
    return build(ModelArguments(model_name_or_path=str(CHAT / name), **arguments))


def _logits(built: Built) -> torch.Tensor:
    context = built.model.img_context_token_id
    count = built.model.config.tokens_per_tile(1)[0]
    ids = torch.tensor([[1, context - 1, *[context] * count, 40, 41, 42]])
    side = built.model.config.image_size
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return built.model(pixels.to(built.model.dtype), ids).logits


def _reloaded(built: Built, folder: Path) -> Built:
    built.model.save_pretrained(folder)
    built.processor.save_pretrained(folder)
    return build(ModelArguments(model_name_or_path=str(folder)))


# ------------------------------------------------------------------------------------------------------ one checkpoint


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_is_what_from_pretrained_loads(name: str) -> None:
    built, reference = _checkpoint(name), load(name)
    assert type(built.model) is InternVLChatModel
    assert_same(built.model.state_dict(), reference.state_dict())
    inputs, kept = batch(name, labels=False), batch(name)["attention_mask"].bool()
    logits = built.model(**inputs).logits
    torch.testing.assert_close(logits[kept], expected(name)["forward.logits"][kept], rtol=1e-4, atol=1e-4)
    assert built.model.img_context_token_id == reference.img_context_token_id
    assert END_OF_TURN[name] in built.model.generation_config.eos_token_id
    assert not built.model.training and all(p.requires_grad for p in built.model.parameters())
    assert built.model.name_or_path == str(CHAT / name)


def test_tokenizer_and_processor_fit() -> None:
    built = _checkpoint()
    own = InternVLProcessor.from_model_config(built.model.config, built.tokenizer)
    assert built.processor.to_dict() == own.to_dict()
    assert built.processor.tokenizer is built.tokenizer
    assert built.tokenizer.chat_template == chat_template(get_template("internvl2_5"), "")


OVERRIDES = {
    "conv_style": ("Hermes-2", "template", "template"),
    "force_image_size": (112, "force_image_size", "image_size"),
    "vision_select_layer": (-2, "select_layer", None),
    "ps_version": ("v1", "ps_version", None),
    "dynamic_image_size": (False, "dynamic_image_size", "dynamic_image_size"),
    "use_thumbnail": (False, "use_thumbnail", "use_thumbnail"),
    "min_dynamic_patch": (2, "min_dynamic_patch", "min_dynamic_patch"),
    "max_dynamic_patch": (3, "max_dynamic_patch", "max_dynamic_patch"),
}


@pytest.mark.parametrize("argument", OVERRIDES)
@pytest.mark.parametrize("saved_processor", [False, True], ids=["released", "saved"])
def test_overrides_reach_model_and_processor(argument: str, saved_processor: bool, tmp_path: Path) -> None:
    """Also after saving; and other settings of a saved processor stay."""
    folder = CHAT / QWEN2
    if saved_processor:
        folder, first = tmp_path / "first", _checkpoint()
        first.processor.image_processor.exact = False
        _reloaded(first, folder)
    value, field, of_processor = OVERRIDES[argument]
    built = build(ModelArguments(model_name_or_path=str(folder), **{argument: value}))
    for found in (built, _reloaded(built, tmp_path / "second")):
        assert getattr(found.model.config, field) == value
        if hasattr(found.model, field):
            assert getattr(found.model, field) == value
        if of_processor == "template":
            assert found.processor.template == value
            assert found.tokenizer.chat_template == chat_template(get_template(value), "")
        elif of_processor is not None:
            assert getattr(found.processor.image_processor, of_processor) == value
        assert found.processor.image_processor.exact is not saved_processor
        assert found.processor.num_image_token == found.model.num_image_token == (16 if value == 112 else 4)
    assert torch.equal(_logits(built), _logits(_reloaded(built, tmp_path / "third")))


def test_drop_path_grows_linearly() -> None:
    built = _checkpoint(drop_path_rate=0.4)
    assert built.model.config.vision_config.drop_path_rate == 0.4
    rates = [layer.drop_path2.rate for layer in built.model.vision_model.encoder.layers]
    assert rates == pytest.approx([0.0, 0.2, 0.4])


def test_select_layer_changes_the_features() -> None:
    model, reference = _checkpoint(vision_select_layer=-2).model, load(QWEN2)
    pixels = expected(QWEN2)["pixel_values"]
    states = reference.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    grid = reference.pixel_shuffle(states.reshape(len(pixels), 4, 4, -1), 0.5)
    assert torch.equal(model.extract_feature(pixels), reference.mlp1(grid.flatten(1, 2)))


def test_positions_are_interpolated_for_good() -> None:
    """What the encoder does in each forward on larger tiles, to the bit; the class row stays."""
    resized, reference = _checkpoint(force_image_size=112).model, load(QWEN2)
    table = resized.vision_model.embeddings.position_embedding
    assert table.shape == (1, 65, 32) and resized.config.vision_config.image_size == 112
    assert torch.equal(table[:, 0], reference.vision_model.embeddings.position_embedding[:, 0])
    pixels = torch.randn(2, 3, 112, 112)
    assert torch.equal(resized.vision_model(pixels)[0], reference.vision_model(pixels)[0])


def test_features_stay_close_on_larger_tiles(tmp_path: Path) -> None:
    """A plain tile and positions that vary smoothly: twice the side must mean nearly the same; scrambled ones not."""
    shutil.copytree(CHAT / QWEN2, tmp_path / "smooth")
    weights = load_file(tmp_path / "smooth" / "model.safetensors")
    key = "vision_model.embeddings.position_embedding"
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 4), torch.linspace(-1, 1, 4), indexing="ij")
    place = torch.stack([rows, columns], -1).reshape(16, 2)
    weights[key][0, 1:] = place @ torch.randn(2, 32)
    save_file(weights, tmp_path / "smooth" / "model.safetensors", metadata={"format": "pt"})
    small = build(ModelArguments(model_name_or_path=str(tmp_path / "smooth"))).model
    large = build(ModelArguments(model_name_or_path=str(tmp_path / "smooth"), force_image_size=112)).model
    tile = torch.randn(1, 3, 1, 1)
    mean = small.extract_feature(tile.expand(1, 3, 56, 56)).mean(1)
    other = large.extract_feature(tile.expand(1, 3, 112, 112)).mean(1)
    scrambled = large.vision_model.embeddings.position_embedding
    scrambled.data[:, 1:] = scrambled.data[:, 1:].flip(-1)
    worse = large.extract_feature(tile.expand(1, 3, 112, 112)).mean(1)
    assert (other - mean).norm() < 0.05 * mean.norm() < (worse - mean).norm()


def test_dtype() -> None:
    model = _checkpoint(dtype="bfloat16").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="dtype must be auto, float32, bfloat16 or float16, got 'bf16'"):
        _checkpoint(dtype="bf16")


def test_attention_reaches_both_towers() -> None:
    model = _checkpoint(attn_implementation="eager").model
    towers = (model.config.vision_config, model.config.llm_config)
    assert [tower._attn_implementation for tower in towers] == ["eager", "eager"]


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        (
            "down_sample_ratio",
            0.25,
            r"down_sample_ratio=0.25 gives the projector 512 channels.* takes 128 \(ratio 0.5",
        ),
        ("down_sample_ratio", 0.3, "down_sample_ratio must be 1, 1/2, 1/3 or another 1/n, got 0.3"),
        ("force_image_size", 60, "force_image_size=60 does not cut into patches of 14 pixels.*take 56 or 84"),
        ("force_image_size", 70, "take 56 or 84"),
        ("vision_select_layer", 4, "vision_select_layer=4 is outside the 4 hidden states"),
        ("vision_select_layer", -5, "give one of -4 to 3"),
        ("ps_version", "v3", "ps_version must be v1 or v2, got 'v3'"),
        ("drop_path_rate", 1.0, "drop_path_rate must be at least 0 and below 1, got 1.0"),
        ("min_dynamic_patch", 13, "need 1 <= min_dynamic_patch <= max_dynamic_patch, got 13 and 12"),
        ("conv_style", "internvl2", "Unknown conversation template 'internvl2'"),
        ("conv_style", "internvl3_5_gpt_oss", r"ends turns with '<\|return\|>', which is no token of the tokenizer"),
        ("vision_path", "somewhere", "vision_path goes with llm_path: the checkpoint .* has its own"),
        ("config", {}, "config goes with llm_path"),
    ],
)
def test_contradictions_are_refused(argument: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _checkpoint(**{argument: value})


def test_an_adapter_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="is a PEFT adapter: merge it into its base first"):
        build(ModelArguments(model_name_or_path=str(tmp_path)))


# ----------------------------------------------------------------------------------------- an encoder, another decoder


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("rows", [300, OLD], ids=["padded", "tight"])
def test_parts_keep_their_weights(backbone: str, rows: int, tmp_path: Path) -> None:
    """Both towers to the bit, as their files say them; only rows of new tokens are written; and all of it reloads."""
    built = _parts(tmp_path, backbone, rows)
    built.model.save_pretrained(tmp_path / "whole")
    whole, llm = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "llm"))
    for name, tensor in load_file(tmp_path / "vision" / "model.safetensors").items():
        assert torch.equal(whole.pop(f"vision_model.{name}"), tensor), name
    tables = {name for name in llm if name.endswith(TABLES)}
    assert len(tables) == (1 if "tied" in backbone else 2)
    new = list(range(OLD, OLD + len(ORDER)))
    for name, tensor in llm.items():
        found = whole.pop(f"language_model.{name}")
        if name not in tables:
            assert torch.equal(found, tensor), name
            continue
        assert len(found) == max(rows, OLD + len(ORDER))  # padding stays, and only what is missing is added
        kept = [i for i in range(rows) if i not in new]
        assert torch.equal(found[kept], tensor[kept]), name
        mean = tensor[:OLD].double().mean(dim=0).float()
        torch.testing.assert_close(found[new], mean.expand(len(new), -1), rtol=1e-5, atol=1e-6)
    assert sorted(whole) == [f"mlp1.{i}.{kind}" for i in (0, 1, 3) for kind in ("bias", "weight")]
    assert torch.equal(_logits(built), _logits(_reloaded(built, tmp_path / "again")))


def test_new_tokens_come_in_order(tmp_path: Path) -> None:
    built = _parts(tmp_path)
    assert list(SPECIAL_TOKENS) == ORDER
    assert built.tokenizer.convert_tokens_to_ids(ORDER) == list(range(OLD, OLD + 9))
    assert built.model.config.img_context_token_id == OLD + 2
    assert built.model.config.llm_config.vocab_size == 300
    assert built.tokenizer("<img>")["input_ids"] == [OLD]
    built.processor.save_pretrained(tmp_path / "saved")
    saved = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert saved.convert_tokens_to_ids(ORDER) == list(range(OLD, OLD + 9))
    assert all(saved.added_tokens_decoder[i].special for i in range(OLD, OLD + 9))


def test_tokens_that_are_there_keep_their_rows(tmp_path: Path) -> None:
    """As Yi's `<img>` and `</img>`: seven are added."""
    built = _parts(tmp_path, "llama", 300, "<img>", "</img>")
    assert built.tokenizer.convert_tokens_to_ids(ORDER) == [3, 4, *range(OLD, OLD + 7)]
    before = load_file(tmp_path / "llm" / "model.safetensors")[EMBED]
    after = built.model.get_input_embeddings().weight
    assert torch.equal(after[:OLD], before[:OLD]) and torch.equal(after[OLD + 7 :], before[OLD + 7 :])


def test_new_rows_depend_on_no_seed(tmp_path: Path) -> None:
    llm, vision = _save_language_model(tmp_path / "llm", rows=OLD), _save_encoder(tmp_path / "vision")
    arguments = ModelArguments(llm_path=str(llm), vision_path=str(vision), conv_style="internvl2_5")
    states = []
    for seed in (1, 2):
        set_seed(seed)
        states.append(build(arguments).model.language_model.state_dict())
    assert_same(*states)


def test_projector_is_fresh_and_follows_the_seed(tmp_path: Path) -> None:
    llm, vision = _save_language_model(tmp_path / "llm"), _save_encoder(tmp_path / "vision")
    arguments = ModelArguments(llm_path=str(llm), vision_path=str(vision), conv_style="internvl2_5")
    set_seed(5)
    first = build(arguments).model.mlp1.state_dict()
    set_seed(5)
    assert_same(first, build(arguments).model.mlp1.state_dict())
    bound = 64**-0.5  # torch's start of a linear layer of 64 inputs: uniform
    assert 0.9 * bound < first["1.weight"].abs().max() <= bound and first["0.weight"].eq(1).all()


def test_parts_have_one_dtype(tmp_path: Path) -> None:
    llm = _save_language_model(tmp_path / "llm", dtype=torch.bfloat16)
    vision = _save_encoder(tmp_path / "vision")
    model = build(ModelArguments(llm_path=str(llm), vision_path=str(vision), conv_style="internvl2_5")).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16


def test_attention_of_parts_is_causal(tmp_path: Path) -> None:
    model = _parts(tmp_path).model
    first, second = torch.tensor([[40, 41, 42]]), torch.tensor([[40, 41, 99]])
    assert torch.equal(model(input_ids=first).logits[:, :2], model(input_ids=second).logits[:, :2])
    assert model.config.llm_config._attn_implementation == "sdpa"


def test_parts_of_chat_checkpoints() -> None:
    """Encoder of one, language model of another: how images become tokens comes with the encoder."""
    built = build(ModelArguments(llm_path=str(CHAT / PHI3), vision_path=str(CHAT / "llama-hermes2-vit6b")))
    config, encoder = built.model.config, load("llama-hermes2-vit6b")
    assert (config.template, config.select_layer, config.ps_version) == ("phi3-chat", -4, "v1")
    assert_same(built.model.vision_model.state_dict(), encoder.vision_model.state_dict())
    assert_same(built.model.language_model.state_dict(), load(PHI3).language_model.state_dict())
    assert built.model.mlp1[1].in_features == 4 * 48 and built.processor.num_image_token == 4


@pytest.mark.parametrize("layout", ["original", "native"])
def test_parts_of_one_checkpoint_are_the_checkpoint(layout: str, tmp_path: Path) -> None:
    folder = str(CHAT / QWEN2)
    if layout == "native":
        convert(folder, tmp_path / "native", "native", progress=False)
        folder = str(tmp_path / "native")
    whole = build(ModelArguments(model_name_or_path=folder))
    parts = build(ModelArguments(llm_path=folder, vision_path=folder, mlp_path=folder))
    assert_same(parts.model.state_dict(), whole.model.state_dict())
    assert torch.equal(_logits(parts), _logits(whole))
    config, other = (built.model.config.to_dict() for built in (parts, whole))
    assert {name for name in config if config[name] != other.get(name)} <= {"_name_or_path"}


def test_described_encoder_is_fresh(tmp_path: Path) -> None:
    llm = _save_language_model(tmp_path / "llm")
    described = {"vision_config": vision_6b_dict(), "max_dynamic_patch": 4, "template": "Hermes-2"}
    built = build(ModelArguments(llm_path=str(llm), config=described, force_image_size=112))
    assert built.model.vision_model.embeddings.position_embedding.shape == (1, 65, 16)
    assert built.model.config.vision_config.qk_normalization and built.processor.template == "Hermes-2"
    assert built.processor.image_processor.max_dynamic_patch == 4
    assert torch.equal(_logits(built), _logits(_reloaded(built, tmp_path / "again")))


@pytest.mark.parametrize("kind", ["bare", "prefixed", "folder"])
def test_projector_from_elsewhere(kind: str, tmp_path: Path) -> None:
    """As the original saves it, or in files of whole models."""
    weights = {name: torch.randn_like(tensor) for name, tensor in load(QWEN2).mlp1.state_dict().items()}
    path = tmp_path / "mlp.bin"
    if kind == "bare":
        torch.save(weights, path)
    elif kind == "prefixed":
        path = tmp_path / "mlp.safetensors"
        named = {f"mlp1.{name}": tensor for name, tensor in weights.items()}
        save_file({**named, "vision_model.other": torch.ones(1)}, path)
    else:
        path, model = tmp_path / "chat", load(QWEN2)
        model.mlp1.load_state_dict(weights)
        model.save_pretrained(path)
    assert_same(_checkpoint(mlp_path=str(path)).model.mlp1.state_dict(), weights)


def test_projector_that_does_not_fit(tmp_path: Path) -> None:
    message = r"mlp1.0.weight has shape \(192,\), the model needs \(128,\)"
    with pytest.raises(ValueError, match=message):
        _checkpoint(mlp_path=str(CHAT / "llama-hermes2-vit6b"))
    torch.save({"0.weight": torch.ones(128)}, tmp_path / "half.bin")
    with pytest.raises(ValueError, match=r"has no mlp1 weights \['0.bias'"):
        _checkpoint(mlp_path=str(tmp_path / "half.bin"))


def test_template_is_asked_for_before_weights_are_read(tmp_path: Path) -> None:
    llm, vision = _save_language_model(tmp_path / "llm"), _save_encoder(tmp_path / "vision")
    (llm / "model.safetensors").unlink()
    fit = "Hermes-2, internlm2-chat, internvl2_5"
    with pytest.raises(ValueError, match=f"conv_style is needed.*tokenizer knows: {fit}$"):
        build(ModelArguments(llm_path=str(llm), vision_path=str(vision)))


def test_a_language_model_that_lacks_weights(tmp_path: Path) -> None:
    llm, vision = _save_language_model(tmp_path / "llm"), _save_encoder(tmp_path / "vision")
    weights = load_file(llm / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, llm / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights of its Qwen2ForCausalLM.*layers.1.mlp.up_proj.weight"):
        build(ModelArguments(llm_path=str(llm), vision_path=str(vision), conv_style="internvl2_5"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"llm_config": {}}, r"config\['llm_config'\] and llm_path exclude one another"),
        ({"vision_config": {}}, r"config\['vision_config'\] and vision_path exclude one another"),
    ],
    ids=["llm", "vision"],
)
def test_described_twice(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        _parts(tmp_path, config=config)


# -------------------------------------------------------------------------------------------------------- from nothing


def _described(**changes: Any) -> dict[str, Any]:
    llm = {name: value for name, value in llm_dict("qwen3").items() if name != "vocab_size"}
    return {"vision_config": vision_dict(), "llm_config": {**llm, **changes}, "template": "internvl2_5"}


def test_fresh_weights(tmp_path: Path) -> None:
    _save_tokenizer(tmp_path)
    built = build(ModelArguments(config=_described(), tokenizer_path=str(tmp_path), force_image_size=84))
    assert built.model.get_input_embeddings().weight.shape == (OLD + 9, 32)
    assert built.model.vision_model.embeddings.position_embedding.shape == (1, 37, 16)
    assert built.model.dtype == torch.float32 and built.model.img_context_token_id == OLD + 2
    assert built.model.generation_config.eos_token_id == [2, 0]  # end of turn, end of text
    assert torch.equal(_logits(built), _logits(_reloaded(built, tmp_path / "again")))


def test_fresh_weights_keep_a_larger_vocabulary(tmp_path: Path) -> None:
    _save_tokenizer(tmp_path)
    model = build(ModelArguments(config=_described(vocab_size=512), tokenizer_path=str(tmp_path))).model
    assert model.get_input_embeddings().weight.shape == (512, 32)
    with pytest.raises(ValueError, match=r"\['vocab_size'\]=268 is too small for the 277 ids"):
        build(ModelArguments(config=_described(vocab_size=OLD), tokenizer_path=str(tmp_path)))


def test_fresh_weights_need_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="needs tokenizer_path"):
        build(ModelArguments(config=_described()))


# -------------------------------------------------------------------------------------------------------- quantization


def test_quantization_needs_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match="quantization='nf4' needs bitsandbytes: pip install bitsandbytes"):
        _checkpoint(quantization="nf4")


def test_quantization_needs_a_base_and_linear_layers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantization='int8' needs model_name_or_path"):
        _parts(tmp_path, quantization="int8")
    _parts(tmp_path, "qwen3_moe").model.save_pretrained(tmp_path / "moe")
    _save_tokenizer(tmp_path / "moe")
    with pytest.raises(ValueError, match="would leave the experts of Qwen3MoeForCausalLM"):
        build(ModelArguments(model_name_or_path=str(tmp_path / "moe"), quantization="nf4"))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_only_the_decoder_is_quantized(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By transformers' own rule of what it replaces."""
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: True)
    monkeypatch.setattr("importlib.metadata.version", lambda package: "1.0.0")
    settings = quantization.quantization_config(kind, "float16")
    assert settings.quantization_method() == {"nf4": "nf4", "int8": "llm_int8"}[kind]
    if kind == "nf4":
        assert settings.bnb_4bit_use_double_quant and settings.bnb_4bit_compute_dtype == torch.float16
    model = load(name)
    kept = HfQuantizer.get_modules_to_not_convert(model, settings.llm_int8_skip_modules, None)
    linear = {n for n, module in model.named_modules() if isinstance(module, nn.Linear)}
    replaced = {n for n in linear if should_convert_module(n, kept)}
    assert replaced == {n for n in linear if n.startswith("language_model.model.layers.")} != set()
