"""What a preview shows: all of a row's text, exactly what is learned, the pixels that the model gets, their grid."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from internvl_hub.app.data_commands import preview_main
from internvl_hub.data.augmentation import Take
from internvl_hub.data.features import FeatureMaker
from internvl_hub.data.media import RowSettings
from internvl_hub.data.pair_preview import make_pair_preview, render_pair
from internvl_hub.data.pairs import PairRecord
from internvl_hub.data.preview import make_preview, render, render_text
from internvl_hub.data.preview_picture import denormalize, draw_preview, grid_of
from internvl_hub.data.records import FrameSampling, Message, Record, Video
from internvl_hub.image_processing_internvl import InternVLImageProcessor
from internvl_hub.tests.training import tiny_models as tiny
from internvl_hub.tiling_internvl import dynamic_preprocess, find_grid

CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "internvl-tiny"


def maker(kind: str = "qwen2") -> FeatureMaker:
    return FeatureMaker(tiny.tokenizer(kind), tiny.image_processor(), tiny.config(kind))


def record(*turns: str, images: int = 0, **media: Any) -> Record:
    speakers = ("human", "gpt") * (len(turns) // 2)
    messages = tuple(Message(speaker, text) for speaker, text in zip(speakers, turns, strict=True))
    return Record(messages, tuple(tiny.picture(k, (80, 40)) for k in range(images)), **media)


def film(folder: Path) -> Video:
    frames = [Image.new("RGB", (28, 28), (60 * i, 0, 0)) for i in range(4)]
    frames[0].save(folder / "film.gif", save_all=True, append_images=frames[1:], duration=500)
    return Video(folder / "film.gif", frames=FrameSampling(indices=(0, 3)))


@pytest.mark.parametrize("kind", ["qwen2", "internlm2"])
def test_text_is_complete_and_learned_parts_are_the_answers(kind: str) -> None:
    row = record("<image>\nWhat?", "A cat.", "Sure?", "Yes, 猫.", images=1)
    preview = make_preview(maker(kind), row)
    visual = sum(span.tokens for span in preview.spans if span.visual)
    assert visual == 4 * sum(preview.tiles)
    assert sum(span.tokens for span in preview.spans) == preview.tokens
    assert preview.answers == ["A cat.<|im_end|>", "Yes, 猫.<|im_end|>"]
    whole = tiny.tokenizer(kind).decode(preview.features["input_ids"])
    shown = render_text(preview.spans, color=False).replace("[+", "").replace("+]", "")
    assert shown == whole.replace("<IMG_CONTEXT>" * visual, f"<IMG_CONTEXT> x {visual}")


def test_typed_context_tokens_are_text() -> None:
    preview = make_preview(maker(), record("a <IMG_CONTEXT> x 9", "b"))
    assert not any(span.visual for span in preview.spans)
    assert "a <IMG_CONTEXT> x 9" in render_text(preview.spans, color=False)


def test_colors_mark_what_is_learned_and_text_cannot_steer_the_terminal() -> None:
    preview = make_preview(maker(), record("Q\x1b[2J", "A"))
    text = render_text(preview.spans, color=True)
    assert "\x1b[1;32mA<|im_end|>\x1b[0m" in text
    assert "Q\\x1b[2J" in text
    assert "\x1b[2J" not in text


def test_counts_and_weights() -> None:
    preview = make_preview(maker(), record("<image><image>", "A cat.", images=2))
    text = render(preview, "sample")
    x = preview.learned
    assert f"tokens   {preview.tokens} ({4 * sum(preview.tiles)} visual, {x} learned)" in text
    assert f"tiles    6 ({' + '.join(map(str, preview.tiles))} of pictures)" in text
    assert f"sample {1 / x:.4g} (row: 1), token 1 (row: {x}), square {x**-0.5:.4g} (row: {x**0.5:.4g})" in text
    assert "learned 1: 'A cat.<|im_end|>'" in text


@pytest.mark.parametrize("kind", ["qwen2", "internlm2"])
def test_pairs_show_the_prompt_once_and_both_answers(kind: str) -> None:
    one, other = (
        record("<image>\nHi", "Hello", "What?", answer, images=1, where="rows:1") for answer in ("A cat.", "No, 猫.")
    )
    row = PairRecord(one, replace(other, images=one.images))
    preview = make_pair_preview(maker(kind), row)
    text = render_pair(preview)
    visual = 4 * sum(preview.tiles)
    assert text.count("What?") == text.count(f"<IMG_CONTEXT> x {visual}") == 1
    assert "assistant\nHello<|im_end|>" in text
    assert "\n\nchosen:\n[+A cat.<|im_end|>+]\n\nrejected:\n[+No, 猫.<|im_end|>+]\n\n" in text
    both = [preview.features[f"{name}_input_ids"] for name in ("chosen", "rejected")]
    prompt, learned = sum(span.tokens for span in preview.prompt), []
    for ids, spans in zip(both, (preview.chosen, preview.rejected), strict=True):
        assert prompt + sum(span.tokens for span in spans) == len(ids)
        learned.append(sum(span.tokens for span in spans if span.learned))
    assert f"tokens   {prompt} of the prompt ({visual} visual), {learned[0]} learned of the chosen answer, " in text
    assert f"{learned[1]} learned of the rejected answer\ntiles    3 (3 of pictures)" in text
    assert preview.tokens == max(map(len, both))
    assert draw_preview(preview, maker().image_processor).tobytes() == (
        draw_preview(make_preview(maker(kind), one), maker().image_processor).tobytes()
    )
    assert "\x1b[1;32mA cat.<|im_end|>\x1b[0m" in render_pair(preview, color=True)


# --------------------------------------------------------------------------------------------------------------- media


def test_tiles_are_the_pixels_that_were_normalised() -> None:
    picture = tiny.picture(3, (90, 50))
    tiles = dynamic_preprocess(picture, max_num=4, image_size=28, use_thumbnail=True)
    for kind in ("imagenet", "clip", "siglip"):
        processor = InternVLImageProcessor(image_size=28, max_dynamic_patch=4, use_thumbnail=True, normalize_type=kind)
        shown = denormalize(processor(picture)["pixel_values"], processor)
        assert np.array_equal(shown, np.stack([np.asarray(tile) for tile in tiles]))


@pytest.mark.parametrize("no_upscale", [False, True])
def test_grid_is_found_again(no_upscale: bool) -> None:
    rng = random.Random(0)
    for _ in range(300):
        size, most = (rng.randint(1, 900), rng.randint(1, 900)), rng.randint(1, 12)
        least = rng.randint(1, most)
        processor = InternVLImageProcessor(
            image_size=56, min_dynamic_patch=least, max_dynamic_patch=most, no_upscale=no_upscale, use_thumbnail=True
        )
        grid = find_grid(*size, least, most, 56, no_upscale=no_upscale)
        assert grid_of(size, processor.num_tiles(*size), processor) == grid


def test_augmentation_shows() -> None:
    row = record("<image>", "A", images=1)
    plain, lossy = (make_preview(maker(), row, RowSettings(data_augment=on), Take(1)) for on in (False, True))
    assert not plain.features["pixel_values"].equal(lossy.features["pixel_values"])
    again = make_preview(maker(), row, RowSettings(data_augment=True), Take(1))
    assert again.features["pixel_values"].equal(lossy.features["pixel_values"])


def test_picture_shows_each_tile_and_frame(tmp_path: Path) -> None:
    row = record("<video>\n<image>\nQ", "A", images=1, videos=(film(tmp_path),))
    preview = make_preview(maker(), row)
    assert preview.owners == (1, 1, 0)
    assert [picture.size for picture in preview.pictures] == [(28, 28), (28, 28), (80, 40)]
    assert "tiles    5 (3 of pictures, 2 of frames)" in render(preview)
    sheet = np.asarray(draw_preview(preview, maker().image_processor))
    tiles = denormalize(preview.features["pixel_values"], maker().image_processor)
    for tile in tiles:  # enlarged by a whole factor, so its pixels are there as they are
        assert contains(sheet, np.kron(tile, np.ones((4, 4, 1), dtype=np.uint8)))
    assert not contains(sheet, np.kron(255 - tiles[-1], np.ones((4, 4, 1), dtype=np.uint8)))


def contains(sheet: np.ndarray, block: np.ndarray) -> bool:
    height, width = block.shape[:2]
    corners = np.argwhere((sheet[: -height + 1, : -width + 1] == block[0, 0]).all(-1))
    return any(np.array_equal(sheet[y : y + height, x : x + width], block) for y, x in corners)


def test_rows_without_media_have_no_picture() -> None:
    assert draw_preview(make_preview(maker(), record("Q", "A")), maker().image_processor) is None


# ------------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.picture(0).save("a.png")
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    lines = [{"conversations": turns}, {"image": "a.png", "conversations": turns}, {"image": "x.png",
             "conversations": turns}]  # fmt: skip
    Path("rows.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    Path("list.json").write_text(json.dumps(lines))
    return tmp_path


def command(*arguments: Any) -> int:
    return preview_main([*map(str, arguments), "--model", str(CHECKPOINT)])


def test_command_prints_and_draws(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("rows.jsonl", "--row", "rows.jsonl:3") == 0
    output = capsys.readouterr().out
    assert "row 1, data set 'rows', rows.jsonl:3" in output
    assert "[+A<|im_end|>+]" in output
    with Image.open("preview/row1.png") as picture:
        assert picture.width > 448
    assert command("list.json", "--row", "list.json[0]", "--output", "none") == 0
    assert "row 0, data set 'list', list.json[0]" in capsys.readouterr().out
    assert not Path("none").exists()


def test_command_names_a_bad_row_and_goes_on(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("rows.jsonl", "--random", 3, "--seed", 1) == 1
    output = capsys.readouterr()
    assert output.out.count("data set 'rows'") == 2
    assert "row 2 of data set 'rows': rows.jsonl:5: cannot load image" in output.err


def test_command_shows_pairs(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"question": "Q", "chosen": "Good", "rejected": "Bad"}, {"question": "Q", "chosen": "Good"},
             {"image": "a.png", "prompt": "Q", "chosen": "Good", "rejected": "Bad"}]  # fmt: skip
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert command("pairs.jsonl", "--row", 2) == 0
    output = capsys.readouterr().out
    assert "row 2, data set 'pairs', pairs.jsonl:3" in output
    assert "chosen:\n[+Good<|im_end|>+]" in output
    assert "rejected:\n[+Bad<|im_end|>+]" in output
    assert Path("preview/row2.png").is_file()
    assert command("pairs.jsonl", "--row", 1) == 1
    assert "pairs.jsonl:2: the row has no 'rejected'" in capsys.readouterr().err


def test_random_rows_depend_on_the_seed(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for seed in (0, 0, 1, 2, 3, 4):
        command("rows.jsonl", "--random", 2, "--seed", seed)
        output = capsys.readouterr()
        shown.append(output.out + output.err)
    assert shown[0] == shown[1]
    assert len(set(shown)) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--row", "3"), "--row must be between 0 and 2, got 3"),
        (("--row", "rows.jsonl:2"), "no data set has such a row"),
        (("--row", "last"), "--row must be a number"),
        (("--random", "4"), "--random must be between 1 and the 3 rows"),
    ],
    ids=["row", "blank", "word", "random"],
)
def test_errors_are_one_line(
    arguments: tuple[str, ...], message: str, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("rows.jsonl", *arguments) == 1
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1


def test_a_model_is_needed(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preview_main(["rows.jsonl"]) == 1
    assert "name a checkpoint with --model" in capsys.readouterr().err
