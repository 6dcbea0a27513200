"""Compressing: which layers, what is refused, what calibrates; with llm-compressor installed, whole folders."""

from __future__ import annotations

import importlib.util
import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from documentation import block_run_by
from PIL import Image
from safetensors.torch import load_file
from tiny import CHAT, INTERNLM2, QWEN2, by_hand, chat_config, llm_dict
from torch import nn

from internvl_hub.app.quantize_command import METHODS as OFFERED
from internvl_hub.app.quantize_command import quantize_main
from internvl_hub.conversion.compression.compress import INSTALL, compress
from internvl_hub.conversion.compression.data import EmbeddedRows, choose_rows
from internvl_hub.conversion.compression.plan import KEPT_PATTERNS, METHODS, matches, plan_compression
from internvl_hub.conversion.convert import upgrade
from internvl_hub.conversion.serving import check_serving
from internvl_hub.modeling_internvl_chat import InternVLChatModel
from internvl_hub.processing_internvl import InternVLProcessor
from internvl_hub.quantization_internvl import KEPT_MODULES
from internvl_hub.tests.conversion.checkpoint_edits import edit
from internvl_hub.training.vocabulary import load_own_tokenizer
from internvl_hub.upload_to_hub import verify

ROOT = Path(__file__).resolve().parents[2]
DENSE = ("qwen2", "qwen3", "llama", "phi3", "internlm2", "mistral", "gemma2")
REFUSED = (("gptq", "internlm2"), ("awq", "internlm2"))  # see test_fused_projections_cannot_be_packed
EXPERTS = ("gpt_oss", "qwen3_moe")
LLM = "language_model."
FULL = pytest.mark.skipif(
    importlib.util.find_spec("llmcompressor") is None, reason="llmcompressor wants transformers <= 5.17"
)


@pytest.fixture(name="source")
def _source(tmp_path: Path) -> Path:
    """A tiny checkpoint as it was released."""
    return _copy(QWEN2, tmp_path / "source")


def _copy(name: str, folder: Path) -> Path:
    return shutil.copytree(CHAT / name, folder, ignore=shutil.ignore_patterns("expected*"))


@pytest.fixture(name="rows")
def _rows(tmp_path: Path) -> Path:
    """Six rows with an image each, two without; the last is long."""
    return write_rows(tmp_path / "data")


def write_rows(folder: Path, grey: bool = False) -> Path:
    """Rows of noise, or of grey pictures."""
    folder.mkdir()
    rows = []
    for i in range(8):
        question = f"What is number {i}?" + " Say it again." * 60 * (i == 7)
        row: dict[str, Any] = {"conversations": [{"from": "human", "value": question}]}
        row["conversations"].append({"from": "gpt", "value": f"A cat, and {i} dogs."})
        if i < 6:
            picture = Image.new("L", (80, 56), 128) if grey else Image.effect_noise((80, 56), 40 + 20 * i)
            picture.convert("RGB").save(folder / f"{i}.png")
            row["image"] = f"{i}.png"
        rows.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return folder / "rows.jsonl"


def linears(model: nn.Module) -> set[str]:
    """Names of all linear layers."""
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def meta(model_type: str) -> InternVLChatModel:
    """A model without weights."""
    with torch.device("meta"):
        return InternVLChatModel(chat_config(model_type))


# -------------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("model_type", [*DENSE, *EXPERTS])
def test_compressed_tensors_finds_the_decoder_and_nothing_else(model_type: str) -> None:
    """By the function that llm-compressor and transformers match with."""
    match = pytest.importorskip("compressed_tensors.utils", reason="needs compressed-tensors").match_named_modules
    model = meta(model_type)
    found = {name for name, _ in match(model, ["Linear"], KEPT_PATTERNS)}
    assert found == {name for name in linears(model) if name.startswith(f"{LLM}model.layers.")} != set()
    assert not any("router" in name or name.endswith(".gate") for name in found)
    kept = linears(model) - found
    assert {name.split(".")[0] for name in kept} == {"vision_model", "mlp1", "language_model"}
    assert [name for name in kept if name.startswith(LLM)] == [f"{LLM}lm_head"]


@pytest.mark.parametrize("pattern", ["re:.*down_proj", f"{LLM}model.layers.0.mlp.up_proj", "down_proj", "re:down_p"])
def test_patterns_mean_what_they_mean_there(pattern: str) -> None:
    match = pytest.importorskip("compressed_tensors.utils", reason="needs compressed-tensors").match_named_modules
    model = meta("qwen2")
    theirs = linears(model) - {name for name, _ in match(model, ["Linear"], [pattern])}
    assert {name for name in linears(model) if matches(name, [pattern])} == theirs


@pytest.mark.parametrize(("method", "model_type"), [case for case in product(METHODS, DENSE) if case not in REFUSED])
def test_plan(method: str, model_type: str) -> None:
    plan = plan_compression(chat_config(model_type), method, 16, ())
    model = meta(model_type)
    layers = {n: m.in_features for n, m in model.get_decoder().layers.named_modules() if isinstance(m, nn.Linear)}
    assert plan.compressed == {f"{LLM}model.layers.{name}": width for name, width in layers.items()}
    assert set(plan.kept) == linears(model) - set(plan.compressed)
    assert plan.kept_by_part() == {"vision_model": 8, "mlp1": 2, "lm_head": 1, "ignored": 0}


def test_more_can_be_kept() -> None:
    plan = plan_compression(chat_config(), "gptq", 32, ["re:.*down_proj", f"{LLM}model.layers.1.self_attn.o_proj"])
    assert plan.kept_by_part()["ignored"] == 3, "width 48 of down_proj does not count for the group size"
    assert not any("down_proj" in name or name.endswith("layers.1.self_attn.o_proj") for name in plan.compressed)


def test_the_list_is_that_of_quantizing_while_loading() -> None:
    names = linears(meta("qwen2"))
    kept = {name for name in names if any(name == k or name.startswith(f"{k}.") for k in KEPT_MODULES)}
    assert {name for name in names if matches(name, KEPT_PATTERNS)} == kept


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("model_type", EXPERTS)
def test_experts_are_refused(model_type: str) -> None:
    with pytest.raises(ValueError, match=r"three-dimensional parameters \(model\.layers\.0\.mlp\.experts"):
        plan_compression(chat_config(model_type), "fp8", 128, ())


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_fused_projections_cannot_be_packed(method: str) -> None:
    with pytest.raises(ValueError, match="InternLM2 stores query, key and value as one tensor.*take fp8 or int8"):
        plan_compression(chat_config("internlm2"), method, 16, ())


def test_group_size_names_the_layer_and_what_would_do() -> None:
    message = r"group_size 32 does not divide the 48 inputs of language_model\.model\.layers\.0\.mlp\.down_proj"
    with pytest.raises(ValueError, match=message + r"; these would do: 16, -1 "):
        plan_compression(chat_config(), "gptq", 32, ())
    for size in (16, -1):
        plan_compression(chat_config(), "awq", size, ())
    plan_compression(chat_config(), "int8", 128, ())  # has no groups


BAD = {
    "method": ({"method": "nf4"}, "method is 'nf4'; choose one of fp8, int8, gptq, awq"),
    "no rows": ({"method": "gptq"}, "method 'gptq' calibrates on data: pass rows"),
    "rows": ({"method": "fp8", "rows": "x.jsonl"}, "method 'fp8' uses no data"),
    "samples": ({"method": "awq", "rows": "x.jsonl", "samples": 0}, "samples must be at least 1, got 0"),
    "length": ({"method": "awq", "rows": "x.jsonl", "max_length": 0}, "max_length must be at least 1, got 0"),
    "group": ({"method": "fp8", "group_size": 0}, "group_size must be positive, or -1 .* got 0"),
    "ignore": ({"method": "fp8", "ignore": ["q_proj"]}, "ignore: 'q_proj' names no linear layer; .*layers.0"),
    "all": ({"method": "fp8", "ignore": ["re:.*"]}, "names every layer of the decoder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str, source: Path, tmp_path: Path) -> None:
    arguments, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        compress(source, tmp_path / "target", **arguments)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("part", ["", "llm_config__"], ids=["outer", "inner"])
def test_quantized_sources_are_refused(part: str, source: Path, tmp_path: Path) -> None:
    edit(source, "config.json", **{f"{part}quantization_config": {"quant_method": "awq"}})
    with pytest.raises(ValueError, match=r"is quantized already \(awq\): start from the full weights"):
        compress(source, tmp_path / "target", "fp8")


def test_adapters_are_refused(source: Path, tmp_path: Path) -> None:
    edit(source, "config.json", use_llm_lora=8)
    with pytest.raises(ValueError, match="LoRA adapters in its weights: merge them first"):
        compress(source, tmp_path / "target", "fp8")


def test_targets_are_never_lost(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="is not empty"):
            compress(source, tmp_path / "mine", "fp8", overwrite=overwrite)
        with pytest.raises(FileExistsError, match="holds the source itself"):
            compress(source, source, "fp8", overwrite=overwrite)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_missing_package_is_one_line(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    without = lambda name, *rest: None if name == "llmcompressor" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(ImportError) as caught:
        compress(source, tmp_path / "target", "fp8")
    assert str(caught.value) == INSTALL and "\n" not in INSTALL
    assert "pip install 'llmcompressor>=0.14,<0.15'" in INSTALL and "transformers <= 5.17" in INSTALL


def test_command_reads_its_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    seen: dict[str, Any] = {}

    def replacement(source: str, target: Path, method: str, **options: Any) -> str:
        seen.update(source=source, target=target, method=method, **options)
        return "done"

    monkeypatch.setattr("internvl_hub.conversion.compression.compress.compress", replacement)
    line = "a b --method awq --data r.jsonl --images i --samples 9 --max-length 99 --group-size -1 --seed 3"
    assert quantize_main([*line.split(), "--overwrite", "--ignore", "re:x", "--ignore", "y"]) == 0
    assert capsys.readouterr().out == "done\n"
    assert seen == {
        "source": "a", "target": Path("b"), "method": "awq", "rows": "r.jsonl", "images": "i", "samples": 9,
        "max_length": 99, "group_size": -1, "ignore": ["re:x", "y"], "seed": 3, "overwrite": True,
    }  # fmt: skip
    assert OFFERED == tuple(METHODS)


def test_command_reports_errors(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert quantize_main([str(source), str(tmp_path / "target"), "--method", "int8"]) == 1
    assert capsys.readouterr().err.startswith("internvl quantize: method 'int8' calibrates on data")


# --------------------------------------------------------------------------------------------------------- calibration


def loaded(source: Path) -> tuple[InternVLChatModel, InternVLProcessor]:
    """Model and processor of a released checkpoint."""
    model, tokenizer = InternVLChatModel.from_pretrained(source).eval(), load_own_tokenizer(source)
    model.img_context_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    return model, InternVLProcessor.from_model_config(model.config, tokenizer)


def test_rows_are_drawn_and_long_ones_left_out(source: Path, rows: Path) -> None:
    model, processor = loaded(source)

    def draw(samples: int, max_length: int = 600, seed: int = 0) -> Any:
        options = {"samples": samples, "max_length": max_length, "seed": seed}
        return choose_rows(rows, rows.parent, processor, model.config, **options)

    everything = draw(100)
    assert sorted(everything.rows) == list(range(7)) and everything.too_long == 1
    assert everything.with_images == 6
    features = [everything.dataset[row] for row in everything.rows]
    assert everything.tokens == sum(len(f["input_ids"]) for f in features)
    assert everything.tiles == sum(sum(f["num_patches"]) for f in features) > 6
    assert "7 rows, 6 with images" in str(everything) and "1 longer rows left out" in str(everything)
    assert draw(3).rows == everything.rows[:3] != draw(3, seed=1).rows
    with pytest.raises(ValueError, match="none of the 8 rows of .* has at most 5 tokens; raise max_length"):
        draw(3, max_length=5)


def test_the_decoder_is_given_visual_tokens(source: Path, rows: Path) -> None:
    """Against the encoder's features put over the context tokens by hand."""
    model, processor = loaded(source)
    chosen = choose_rows(rows, rows.parent, processor, model.config, samples=8, max_length=600)
    embedded = EmbeddedRows(model, chosen)
    assert len(embedded) == 7
    for index, row in enumerate(chosen.rows):
        features = chosen.dataset[row]
        ids, pixels = features["input_ids"].unsqueeze(0), features["pixel_values"]
        with torch.no_grad():
            visual = torch.zeros(0, 32) if pixels is None else model.extract_feature(pixels)
            expected = by_hand(model, ids, visual)
        given = embedded[index]
        assert list(given) == ["inputs_embeds"] and not given["inputs_embeds"].requires_grad
        torch.testing.assert_close(given["inputs_embeds"], expected)


def test_rows_without_images_are_said_so(source: Path, tmp_path: Path) -> None:
    model, processor = loaded(source)
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    (tmp_path / "text.jsonl").write_text(json.dumps({"conversations": talk}))
    chosen = choose_rows(tmp_path / "text.jsonl", None, processor, model.config, samples=4, max_length=600)
    assert "the decoder never saw visual tokens" in str(chosen)


# ------------------------------------------------------------------------------------------------------- whole folders


def run(source: Path, target: Path, method: str, rows: Path | None, **options: Any) -> Any:
    """`compress` with groups that fit."""
    data = {} if method == "fp8" else {"rows": rows, "images": rows.parent, "samples": 6, "max_length": 600}
    return compress(source, target, method, **{"group_size": 16, **data, **options})


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of a folder."""
    return load_file(folder / "model.safetensors")


@torch.no_grad()
def difference(model: InternVLChatModel, full: InternVLChatModel) -> float:
    """Of the logits, relative to their norm."""
    ids = torch.randint(20, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    one, other = model(input_ids=ids).logits.float(), full(input_ids=ids).logits.float()
    return float((one - other).norm() / other.norm())


@FULL
@pytest.mark.parametrize("method", METHODS)
def test_a_folder_is_complete(method: str, source: Path, rows: Path, tmp_path: Path) -> None:
    report = run(source, tmp_path / "target", method, rows)
    before, after = stored(source), stored(tmp_path / "target")
    for name in before:
        if name.startswith(("vision_model.", "mlp1.")) or "lm_head" in name or "embed_tokens" in name:
            assert torch.equal(before[name], after[name]), name
    packed = {name.rpartition(".")[0] for name in after if name.endswith("weight_scale")}
    assert packed == set(report.plan.compressed)
    assert len(packed) == 14 and "14 linear layers" in str(report)
    assert report.bytes_after < report.bytes_before == sum(t.nbytes for t in before.values())
    assert report.bytes_after == sum(t.nbytes for t in after.values())
    assert "missing" not in verify(tmp_path / "target"), "with the folder's own code"
    upgrade(source, tmp_path / "plain")
    problems = [
        [f.message for f in check_serving(folder) if f.level == "problem"]
        for folder in (tmp_path / "plain", tmp_path / "target")
    ]
    assert problems[0] == problems[1]


@FULL
@pytest.mark.parametrize("method", METHODS)
def test_it_loads_again_and_answers(method: str, source: Path, rows: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "target", method, rows)
    model, info = InternVLChatModel.from_pretrained(tmp_path / "target", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    full, processor = loaded(source)
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    options = {"do_sample": False, "max_new_tokens": 6}
    assert isinstance(model.eval().chat(processor.tokenizer, pixels, "<image>\nWhat is it?", options), str)
    assert 0 < difference(model, full) < (0.2 if method in ("fp8", "int8") else 0.7)


@FULL
def test_fp8_is_rounding_to_the_nearest(source: Path, tmp_path: Path) -> None:
    """Scale and weight of every channel, computed here."""
    report = run(source, tmp_path / "target", "fp8", None)
    before, after = stored(source), stored(tmp_path / "target")
    for name in report.plan.compressed:
        weight = before[f"{name}.weight"].float()
        scale = weight.abs().amax(dim=1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        torch.testing.assert_close(after[f"{name}.weight_scale"].float(), scale, rtol=1e-2, atol=0)
        rounded = (weight / after[f"{name}.weight_scale"].float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(after[f"{name}.weight"].float(), rounded.float())


@FULL
def test_images_calibrate(source: Path, rows: Path, tmp_path: Path) -> None:
    """Other pictures in the same rows give other weights; the same ones the same."""
    grey = write_rows(tmp_path / "grey", grey=True)
    for name, data in (("one", rows), ("two", rows), ("grey", grey)):
        run(source, tmp_path / f"of-{name}", "gptq", data)
    one, two, grey_ = (stored(tmp_path / f"of-{name}") for name in ("one", "two", "grey"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    packed = [name for name in one if name.endswith("weight_packed")]
    assert any(not torch.equal(one[name], grey_[name]) for name in packed)


@FULL
@pytest.mark.parametrize("method", ["fp8", "int8"])
def test_internlm2_keeps_its_names(method: str, rows: Path, tmp_path: Path) -> None:
    source = _copy(INTERNLM2, tmp_path / "internlm2")
    run(source, tmp_path / "target", method, rows)
    names = {name.removesuffix("_scale") for name in stored(tmp_path / "target")}
    assert names == set(stored(source))
    model = InternVLChatModel.from_pretrained(tmp_path / "target").eval()
    full = loaded(source)[0]
    assert 0 < difference(model, full) < 0.2


@FULL
def test_overwriting_and_more_kept(source: Path, rows: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "target", "gptq", rows, group_size=-1)
    layer = f"{LLM}model.layers.0.mlp.down_proj"
    assert stored(tmp_path / "target")[f"{layer}.weight_scale"].shape == (len(stored(source)[f"{layer}.weight"]), 1)
    with pytest.raises(FileExistsError):
        run(source, tmp_path / "target", "gptq", rows)
    run(source, tmp_path / "target", "gptq", rows, ignore=["re:.*down_proj"], overwrite=True)
    values = json.loads((tmp_path / "target" / "config.json").read_text())["quantization_config"]
    assert values["ignore"] == [*KEPT_PATTERNS, "re:.*down_proj"]
    assert f"{layer}.weight" in stored(tmp_path / "target")
    InternVLChatModel.from_pretrained(tmp_path / "target")


@FULL
def test_the_page_shows_one_call(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The block of docs/compression.md, with a model whose layers the default groups of 128 divide."""
    monkeypatch.chdir(tmp_path)
    _, processor = loaded(source)
    wide = llm_dict("qwen2", hidden_size=128, intermediate_size=256)
    InternVLChatModel(chat_config(llm_config=wide)).save_pretrained("my-model")
    processor.save_pretrained("my-model")
    write_rows(tmp_path / "images").rename("train.jsonl")
    block = block_run_by("tests/conversion/test_compression.py", ROOT / "docs" / "compression.md")
    exec(compile(block, "docs/compression.md", "exec"), {})  # noqa: S102
    assert "14 linear layers" in capsys.readouterr().out
    InternVLChatModel.from_pretrained("my-model-awq")
