"""Reference dumps against the numbers of the original code, and what two dumps' differences read like."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import CHAT, CHECKPOINTS, CONTEXT, INTERNLM2, LLAMA, PHI3, QWEN2, record
from transformers import PreTrainedTokenizerFast

from internvl_hub.checkpoint_internvl import CheckpointError
from internvl_hub.configuration_internvl_chat import InternVLChatConfig
from internvl_hub.conversation import TemplateError
from internvl_hub.conversion.golden import compare_golden, golden, image_record
from internvl_hub.conversion.golden_inputs import IMAGES, PROMPTS, synthetic_image
from internvl_hub.image_processing_internvl import InternVLImageProcessor, dynamic_preprocess
from internvl_hub.native_internvl import config_to_native, tensors_to_native
from internvl_hub.processing_internvl import InternVLProcessor
from internvl_hub.prompting_internvl import TokenizerError

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
TINY = ROOT / "checkpoints" / "internvl-tiny"
# Question of expected.json -> conversation of the dump, and whether the fixture has as many tiles.
SAME = {
    "Describe the image.": ("one_image", True),
    "<image>\nWhat is on the left?": ("one_tile", True),
    "Hello, who are you?": ("text", True),
    "Image-1: <image>\nImage-2: <image>\nWhat differs?": ("several_images", False),
    "And the colour?": ("several_turns", False),
}


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`dumps(name)` is the folder of a fixture checkpoint's dump."""

    @cache
    def dump(name: str) -> Path:
        folder = tmp_path_factory.mktemp("golden") / name
        assert golden(CHAT / name, folder) == folder / "golden.json"
        return folder

    return dump


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "golden.json").read_text(encoding="utf-8"))


def changed(source: Path, target: Path, change: Any) -> Path:
    """A dump with an edited JSON file."""
    values = read(source)
    change(values)
    target.mkdir()
    (target / "golden.json").write_text(json.dumps(values), encoding="utf-8")
    return target


# --------------------------------------------------------------------------------------------- prompts of the original


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_prompts_are_those_of_the_original_code(name: str, dumps: Any) -> None:
    prompts, seen = read(dumps(name))["prompts"], set()
    for case in record(name)["cases"]:
        label, same_tiles = SAME[case["question"]]
        found = prompts[label]
        assert found["prompt"] == re.sub(r"<img>(<IMG_CONTEXT>)+</img>", "<image>", case["prompt"])
        assert _without_runs(found["input_ids"]) == _without_runs(case["prompt_ids"])
        if same_tiles:
            assert found["input_ids"] == case["prompt_ids"]
            assert found["tiles"] == case["num_patches_list"]
        seen.add(label)
    assert seen == {label for label, _ in SAME.values()}


def _without_runs(ids: list[int]) -> list[int]:
    return [one for one, run in groupby(ids) for _ in ([one] if one == CONTEXT else run)]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_system_texts_and_turns_are_those_of_the_original_code(name: str, dumps: Any) -> None:
    values = read(dumps(name))
    texts = {
        (row["template"], row["system_message"], json.dumps(row["messages"], ensure_ascii=False)): row["prompt"]
        for row in json.loads((FIXTURES / "prompts.json").read_text(encoding="utf-8"))
    }
    chinese = [["u", "你好"], ["a", "您好！"], ["u", "1+1=?"], ["a", "2"], ["u", "Thanks"], ["a", None]]
    for label, system, messages in (
        ("system", "You are a helpful assistant.", [["u", "Hi"], ["a", None]]),
        ("empty_system", "", [["u", "Hi"], ["a", None]]),
        ("chinese", None, chinese),
    ):
        key = (values["template"], system, json.dumps(messages, ensure_ascii=False))
        assert values["prompts"][label]["prompt"] == texts[key]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_ids_are_consistent(name: str, dumps: Any) -> None:
    """Context tokens in each prompt, and the ids of its text as the tokenizer itself encodes it."""
    values, tokenizer = read(dumps(name)), PreTrainedTokenizerFast.from_pretrained(CHAT / name)
    assert values["context_id"] == CONTEXT
    for label, prompt in values["prompts"].items():
        assert prompt["messages"] == json.loads(json.dumps(PROMPTS[label]))
        assert prompt["input_ids"].count(CONTEXT) == sum(prompt["tiles"]) * values["tokens_per_tile"]
        text = prompt["prompt"]
        for tiles in prompt["tiles"]:
            text = text.replace("<image>", f"<img>{'<IMG_CONTEXT>' * tiles * values['tokens_per_tile']}</img>", 1)
        assert prompt["input_ids"] == tokenizer(text)["input_ids"], label


@pytest.mark.parametrize(("name", "stops"), [(QWEN2, [4]), (INTERNLM2, [2, 4]), (LLAMA, [2, 4]), (PHI3, [8])])
def test_stop_ids(name: str, stops: list[int], dumps: Any) -> None:
    """End of turn of the template, of the tokenizer (both 4, Phi-3: 8) and the model's configuration (4, 2, 2, 8)."""
    assert read(dumps(name))["stop_ids"] == stops


# ---------------------------------------------------------------------------------------------- pixels of the original


def _processor(**settings: Any) -> InternVLProcessor:
    """One whose image settings alone matter."""
    config = InternVLChatConfig.from_pretrained(CHAT / QWEN2)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(CHAT / QWEN2)
    return InternVLProcessor.from_model_config(config, tokenizer, **settings)


CASES = [
    row
    for row in json.loads((FIXTURES / "pixels.json").read_text(encoding="utf-8"))
    if row["normalize"] == "imagenet" and not row.get("pad2square")
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["image"].removeprefix("images/"))
def test_pixels_are_those_of_the_original_code(case: dict[str, Any]) -> None:
    settings = {"image_size": case["tile_size"], "max_dynamic_patch": case["max_num"]}
    found = image_record(
        _processor(**settings, use_thumbnail=case["use_thumbnail"]), Image.open(FIXTURES / case["image"])
    )
    assert found["tiles"] == case["shape"][0]
    assert found["sha256_float32"] == case["sha256_float32"]


def test_pixels_at_the_released_tile_size() -> None:
    """The picture and its hash of pixels_448.json (800 x 1300)."""
    row = json.loads((FIXTURES / "pixels_448.json").read_text(encoding="utf-8"))["rows"][0]
    width, height = row["width"], row["height"]
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(row["seed"]).integers(0, 55, (height, width))
    planes = [x * 255 // (width - 1), y * 255 // (height - 1), ((x // 7 + y // 5) % 2) * 200 + noise]
    image = Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))
    found = image_record(_processor(image_size=448), image)
    assert (found["tiles"], found["sha256_float32"]) == (row["shape"][0], row["sha256_float32"])


def test_grids_are_those_of_the_original_code() -> None:
    processor = _processor(image_size=448)
    rows = json.loads((FIXTURES / "tiling.json").read_text(encoding="utf-8"))["rows"]
    wanted = {tuple(row[:2]): list(row[4:]) for row in rows if row[2:4] == [1, 12]}
    for size in ((1, 1), (100, 100), (449, 447), (640, 480), (896, 448), (300, 4000)):
        found = image_record(processor, Image.new("RGB", size))
        assert found["grid"] == wanted[size]
        assert found["tiles"] == wanted[size][0] * wanted[size][1] + (wanted[size] != [1, 1])


@pytest.mark.parametrize("name", IMAGES)
def test_hashes_before_normalisation(name: str, dumps: Any) -> None:
    """Of Pillow's tiles, as cut by the function that takes no settings of a processor."""
    found = read(dumps(QWEN2))["images"][name]
    image = Image.open(dumps(QWEN2) / "images" / f"{name}.png")
    tiles = np.stack([np.asarray(tile) for tile in dynamic_preprocess(image, 1, 12, 56, use_thumbnail=True)])
    assert tiles.dtype == np.uint8
    assert len(tiles) == found["tiles"]
    assert hashlib.sha256(tiles.tobytes()).hexdigest() == found["sha256_uint8"]


@pytest.mark.parametrize("settings", [{"dynamic_image_size": False}, {"max_total_patches": 5}, {"no_upscale": True}])
def test_settings_reach_grid_and_tiles(settings: dict[str, Any]) -> None:
    processor, image = _processor(), synthetic_image(61, 40)
    usual = image_record(processor, image)
    processor.image_processor = InternVLImageProcessor(**{"image_size": 56, **settings})
    found = image_record(processor, image)
    assert found["tiles"] < usual["tiles"]
    columns, rows = found["grid"]
    assert found["tiles"] == columns * rows + (columns * rows > 1)


# -------------------------------------------------------------------------------------------------------------- images


def test_images_are_what_the_dump_says(dumps: Any) -> None:
    values = read(dumps(QWEN2))
    assert {path.stem for path in (dumps(QWEN2) / "images").iterdir()} == set(IMAGES) == set(values["images"])
    for name, (width, height, mode) in IMAGES.items():
        image = Image.open(dumps(QWEN2) / "images" / f"{name}.png")
        assert (image.size, image.mode) == ((width, height), mode)
        assert (values["images"][name]["size"], values["images"][name]["mode"]) == ([width, height], mode)
        assert image.tobytes() == synthetic_image(width, height, mode).tobytes()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_the_formula_of_the_images(mode: str) -> None:
    """Pixel by pixel, in plain integers."""
    image = synthetic_image(19, 11, mode)
    for y in range(11):
        for x in range(19):
            blue = (x // 7 + y // 5) % 2 * 200 + (x * 31 + y * 17) % 56
            full = (x * 255 // 18, y * 255 // 10, blue, (x + 2 * y) % 256)
            assert image.getpixel((x, y)) == (blue if mode == "L" else full[: len(mode)])


# --------------------------------------------------------------------------------------------------- other checkpoints


def test_weights_are_not_needed(tmp_path: Path, dumps: Any) -> None:
    folder = tmp_path / "a"
    shutil.copytree(CHAT / QWEN2, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    golden(folder, tmp_path / "out")
    assert compare_golden(tmp_path / "out", dumps(QWEN2)) == []


@pytest.mark.parametrize("name", [QWEN2, INTERNLM2])
def test_the_native_layout_gives_the_same_prompts_and_pixels(name: str, tmp_path: Path, dumps: Any) -> None:
    folder = tmp_path / "native"
    shutil.copytree(CHAT / name, folder, ignore=shutil.ignore_patterns("expected.*"))
    config = InternVLChatConfig.from_pretrained(folder)
    config.img_context_token_id = CONTEXT
    save_file(tensors_to_native(load_file(folder / "model.safetensors"), config), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_to_native(config)), encoding="utf-8")
    golden(folder, tmp_path / "out")
    assert compare_golden(tmp_path / "out", dumps(name)) == []


def test_a_saved_processor_is_used(tmp_path: Path) -> None:
    """The tiny checkpoint's own: tiles of 64 pixels, at most 6, 16 tokens each."""
    values = read(golden(TINY, tmp_path / "out").parent)
    settings = values["image_settings"]
    assert (settings["image_size"], settings["max_dynamic_patch"], values["tokens_per_tile"]) == (64, 6, 16)
    assert values["prompts"]["one_image"]["input_ids"].count(values["context_id"]) == 3 * 16
    folder = tmp_path / "a"
    shutil.copytree(TINY, folder)
    path = folder / "processor_config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved["image_processor"]["max_dynamic_patch"] = 2
    path.write_text(json.dumps(saved), encoding="utf-8")
    golden(folder, tmp_path / "two")
    differences = compare_golden(tmp_path / "out", tmp_path / "two")
    assert "image_settings.max_dynamic_patch is 6 in the first and 2 in the second" in differences
    assert any(difference.startswith("images.photo: cut into ") for difference in differences)


def test_code_in_the_folder_is_neither_run_nor_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*args: Any) -> str:
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", ask)
    folder = tmp_path / "a"
    shutil.copytree(TINY, folder)
    for name in ("configuration_internvl_chat.py", "modeling_internvl_chat.py", "processing_internvl.py"):
        (folder / name).write_text("raise AssertionError('this code was run')", encoding="utf-8")
    golden(TINY, tmp_path / "without")
    golden(folder, tmp_path / "with")
    assert compare_golden(tmp_path / "with", tmp_path / "without") == []


def test_what_cannot_be_dumped(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no folder here"):
        golden(tmp_path / "absent", tmp_path / "out")
    folder = tmp_path / "a"
    shutil.copytree(CHAT / QWEN2, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(TokenizerError, match="does not load"):
        golden(folder, tmp_path / "out")
    shutil.copyfile(CHAT / QWEN2 / "tokenizer.json", folder / "tokenizer.json")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "template": "vicuna"}), encoding="utf-8")
    with pytest.raises(TemplateError, match="vicuna"):
        golden(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileExistsError, match="not empty"):
        golden(CHAT / QWEN2, folder)


# ----------------------------------------------------------------------------------------------------------- comparing


def test_a_dump_equals_itself_whatever_made_it(tmp_path: Path, dumps: Any) -> None:
    def change(values: dict[str, Any]) -> None:
        values["versions"] = {"engine": "9"}
        values["checkpoint"] = "elsewhere"

    other = changed(dumps(QWEN2), tmp_path / "b", change)
    assert compare_golden(dumps(QWEN2), other) == []
    assert compare_golden(dumps(QWEN2) / "golden.json", other) == []


CHANGES = {
    "template": (
        lambda v: v.update(template="phi3-chat"),
        "template is 'internvl2_5' in the first and 'phi3-chat' in the second",
    ),
    "stops": (lambda v: v.update(stop_ids=[2]), "stop_ids is [4] in the first and [2] in the second"),
    "setting": (
        lambda v: v["image_settings"].update(max_dynamic_patch=6),
        "image_settings.max_dynamic_patch is 12 in the first and 6 in the second",
    ),
    "missing setting": (
        lambda v: v["image_settings"].pop("exact"), "image_settings.exact is only in the first",
    ),
    "missing prompt": (lambda v: v["prompts"].pop("text"), "prompts.text is only in the first"),
    "more prompts": (lambda v: v["prompts"].update(more={}), "prompts.more is only in the second"),
    "missing part": (lambda v: v.pop("images"), "images is only in the first"),
    "text": (
        lambda v: v["prompts"]["system"].update(prompt=v["prompts"]["system"]["prompt"].replace("Hi", "Ho")),
        "prompts.system: the texts differ at character 76: 'rt|>user\\nHi<|im_end|>\\n<|im_start|>assist' and "
        "'rt|>user\\nHo<|im_end|>\\n<|im_start|>assist'",
    ),
    "ids": (
        lambda v: v["prompts"]["text"]["input_ids"].insert(1, 7),
        "prompts.text: ids differ at position 1: ",
    ),
    "tiles": (
        lambda v: v["prompts"]["one_image"].update(tiles=[7]),
        "prompts.one_image.tiles is [3] in the first and [7] in the second",
    ),
    "grid": (
        lambda v: v["images"]["photo"].update(grid=[3, 4], tiles=13),
        "images.photo: cut into 2x3 (7 tiles) and 3x4 (13 tiles)",
    ),
    "resizing": (
        lambda v: v["images"]["photo"].update(sha256_uint8="0", sha256_float32="0"),
        "images.photo: the same grid 2x3 (7 tiles), but other pixels after resizing",
    ),
    "normalisation": (
        lambda v: v["images"]["photo"].update(sha256_float32="0"),
        "images.photo: the same pixels, but normalised to other numbers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_one_change_is_one_sentence(name: str, tmp_path: Path, dumps: Any) -> None:
    change, sentence = CHANGES[name]
    (difference,) = compare_golden(dumps(QWEN2), changed(dumps(QWEN2), tmp_path / "b", change))
    assert difference == sentence or (name == "ids" and difference.startswith(sentence))
    assert name != "ids" or difference.endswith(" ids), though the texts are the same")


def test_two_checkpoints_differ(dumps: Any) -> None:
    differences = compare_golden(dumps(QWEN2), dumps(PHI3))
    assert differences[0] == "template is 'internvl2_5' in the first and 'phi3-chat' in the second"
    assert not any(difference.startswith("images.") for difference in differences)  # the same settings
    assert sum(difference.startswith("prompts.") for difference in differences) == 2 * len(PROMPTS)


def test_what_is_no_dump(tmp_path: Path, dumps: Any) -> None:
    with pytest.raises(CheckpointError, match="has no golden.json"):
        compare_golden(dumps(QWEN2), tmp_path)
    (tmp_path / "golden.json").write_text('{"format": 99}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="no dump of format 1.*99"):
        compare_golden(dumps(QWEN2), tmp_path)
