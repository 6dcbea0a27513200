"""The image processor against the original's numbers, and what it promises for every kind of input."""

import base64
import hashlib
import io
import json
import struct
import subprocess
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_image  # two photographs, bundled
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # see versions.py

from internvl_hub import image_processing_internvl, tiling_internvl
from internvl_hub.image_processing_internvl import (
    NORMALIZATIONS,
    ImageLoadError,
    InternVLImageProcessor,
    array_to_image,
    dynamic_preprocess,
    find_grid,
    load_image,
    split_tile_budget,
)
from internvl_hub.tiling_internvl import candidate_grids, resize_bicubic, tile_count

FIXTURES = Path(__file__).parent / "fixtures"
TILING = json.loads((FIXTURES / "tiling.json").read_text())
PIXELS = json.loads((FIXTURES / "pixels.json").read_text())
PIXELS_448 = json.loads((FIXTURES / "pixels_448.json").read_text())["rows"]
LEGACY = {
    "crop_size": 448,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "size": 448,
}
edges = st.integers(1, 5000)


def digest(pixels: torch.Tensor) -> str:
    assert pixels.dtype == torch.float32
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()


def synthetic(width: int, height: int, seed: int) -> Image.Image:
    """The recipe that pixels_448.json states under `how`."""
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(seed).integers(0, 55, (height, width))
    channels = (x * 255 // (width - 1), y * 255 // (height - 1), ((x // 7 + y // 5) % 2) * 200 + noise)
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def processor() -> InternVLImageProcessor:
    return InternVLImageProcessor(image_size=28)


@pytest.fixture
def picture() -> Image.Image:
    return synthetic(90, 61, seed=3)


# --- parity ----------------------------------------------------------------------------------------------------------


def test_grids_equal_the_originals():
    wrong = [row for row in TILING["rows"] if list(find_grid(*row[:4], TILING["image_size"])) != row[4:]]
    assert len(TILING["rows"]) > 300 and wrong == []


@pytest.mark.parametrize("case", PIXELS, ids=lambda case: f"{Path(case['image']).stem}-{case['normalize']}")
def test_pixels_are_bit_identical(case):
    output = InternVLImageProcessor(
        image_size=case["tile_size"],
        max_dynamic_patch=case["max_num"],
        use_thumbnail=case["use_thumbnail"],
        normalize_type=case["normalize"],
    )(load_image(FIXTURES / case["image"]))
    assert list(output["pixel_values"].shape) == case["shape"]
    assert digest(output["pixel_values"]) == case["sha256_float32"]


@pytest.mark.parametrize("index", range(6))
def test_stored_tiles_and_pad2square(index, processor):
    stored = load_file(FIXTURES / "pixels.safetensors")
    case = PIXELS[3 * index]
    image = load_image(FIXTURES / case["image"])
    options = {"image_size": case["tile_size"], "max_num": case["max_num"], "use_thumbnail": case["use_thumbnail"]}
    tiled = processor(image, **options)["pixel_values"]
    padded = processor(image, image_size=case["tile_size"], dynamic_image_size=False, pad2square=True)["pixel_values"]
    assert torch.equal(tiled, stored[str(index)])
    assert torch.equal(padded, stored[f"{index}.pad2square"])
    assert torch.equal(processor(image, pad2square=True, **options)["pixel_values"], tiled)


@pytest.mark.parametrize("row", PIXELS_448, ids=lambda row: f"{row['width']}x{row['height']}")
def test_full_size_pixels_are_bit_identical(row):
    output = InternVLImageProcessor()(synthetic(row["width"], row["height"], row["seed"]))
    assert list(output["pixel_values"].shape) == row["shape"]
    assert digest(output["pixel_values"]) == row["sha256_float32"]


WORKED_EXAMPLES = [  # width, height, max_num, grid, tiles with thumbnail
    (448, 448, 12, (1, 1), 1),
    (620, 620, 12, (1, 1), 1),
    (634, 634, 12, (2, 2), 5),
    (896, 896, 12, (2, 2), 5),
    (1000, 1000, 12, (3, 3), 10),
    (1600, 1600, 40, (5, 5), 26),
    (800, 1300, 12, (2, 3), 7),
    (800, 1300, 6, (2, 3), 7),
    (800, 1300, 40, (5, 8), 41),
    (1920, 1080, 12, (4, 2), 9),
    (1080, 1920, 12, (2, 4), 9),
    (3840, 2160, 40, (7, 4), 29),
    (640, 480, 12, (4, 3), 13),
    (612, 792, 12, (3, 4), 13),
    (1240, 1754, 18, (2, 3), 7),
    (2480, 3508, 24, (4, 6), 25),
    (1000, 667, 6, (3, 2), 7),
    (500, 1500, 6, (1, 3), 4),
    (300, 100, 12, (3, 1), 4),
    (10000, 100, 12, (12, 1), 13),
    (100, 10000, 6, (1, 6), 7),
    (336, 336, 6, (1, 1), 1),
]


@pytest.mark.parametrize(("width", "height", "max_num", "grid", "tiles"), WORKED_EXAMPLES)
def test_worked_examples(width, height, max_num, grid, tiles):
    assert find_grid(width, height, 1, max_num) == grid
    assert InternVLImageProcessor().num_tiles(width, height, max_num=max_num) == tiles


@pytest.mark.parametrize(("max_num", "count"), [(6, 14), (12, 35), (24, 84), (36, 140), (40, 158)])
def test_number_of_candidate_grids(max_num, count):
    assert len(set(candidate_grids(1, max_num))) == len(candidate_grids(1, max_num)) == count


# --- grid ------------------------------------------------------------------------------------------------------------


@given(edges, edges, st.integers(1, 6), st.integers(0, 12), st.booleans())
def test_grid_stays_within_bounds(width, height, min_num, extra, no_upscale):
    columns, rows = find_grid(width, height, min_num, min_num + extra, no_upscale=no_upscale)
    assert min_num <= columns * rows <= min_num + extra


@given(st.sampled_from(candidate_grids(1, 12)), st.integers(1, 1500))
def test_grid_of_the_turned_image_is_turned(shape, scale):
    """Only where the image has a grid's own ratio: distances of ratios are not symmetric under turning elsewhere."""
    width, height = scale * shape[0], scale * shape[1]
    columns, rows = find_grid(width, height)
    assert columns * shape[1] == rows * shape[0]
    assert find_grid(height, width) == (rows, columns)


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_no_upscale_never_enlarges_by_more_than_a_third(width, height):
    columns, rows = find_grid(width, height, no_upscale=True)
    assert columns == 1 or columns * 448 * 3 <= width * 4
    assert rows == 1 or rows * 448 * 3 <= height * 4


def test_no_upscale_examples():
    assert find_grid(640, 480, no_upscale=True) == (1, 1)
    assert find_grid(800, 1300, no_upscale=True) == (2, 3)
    columns, rows = find_grid(100, 100, 4, 12, no_upscale=True)
    assert columns * rows == 4


@pytest.mark.parametrize(
    ("arguments", "word"),
    [((9, 9, 0), "min_num"), ((9, 9, 3, 2), "max_num"), ((9, 9, 1, 2, 0), "image_size"), ((0, 9), "width")],
)
def test_bad_grid_arguments_name_themselves(arguments, word):
    with pytest.raises(ValueError, match=word):
        find_grid(*arguments)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(1, 12))
def test_tiles_reassemble_to_the_resized_image_with_the_thumbnail_last(width, height, max_num):
    image = Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))
    columns, rows = find_grid(width, height, 1, max_num, 16)
    tiles = dynamic_preprocess(image, 1, max_num, 16, use_thumbnail=True)
    assert len(tiles) == tile_count((columns, rows), True)
    canvas = Image.new("RGB", (16 * columns, 16 * rows))
    for index in range(columns * rows):
        canvas.paste(tiles[index], (16 * (index % columns), 16 * (index // columns)))
    assert np.array_equal(canvas, resize_bicubic(image, canvas.size))
    assert np.array_equal(tiles[-1], resize_bicubic(image, (16, 16)))


@settings(max_examples=60, deadline=None)
@given(*[st.integers(1, 60)] * 4)
def test_resize_is_pillows(width, height, new_width, new_height):
    noise = np.random.default_rng(0).integers(0, 2, (height, width, 3), dtype=np.uint8) * 255
    image, size = Image.fromarray(noise), (new_width, new_height)
    ours = np.asarray(resize_bicubic(image, size))
    rows_first = image.resize((new_width, height)).resize(size)
    columns_first = image.resize((width, new_height)).resize(size)
    assert any(np.array_equal(ours, other) for other in (rows_first, columns_first))
    if int(Image.__version__.split(".")[0]) >= 13:  # the version that made the fixtures
        assert np.array_equal(ours, image.resize(size))


# --- budgets ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(edges, edges), min_size=1, max_size=6), st.integers(0, 60), st.booleans())
def test_budget_holds(sizes, spare, use_thumbnail):
    total = len(sizes) + spare
    caps = split_tile_budget(sizes, total, use_thumbnail=use_thumbnail)
    tiles = [tile_count(find_grid(*size, 1, cap), use_thumbnail) for size, cap in zip(sizes, caps, strict=True)]
    assert sum(tiles) <= total and min(tiles) >= 1


def test_budget_takes_from_the_largest():
    assert split_tile_budget([(448, 448), (1920, 1080), (800, 1300)], 17) == [12, 12, 12]
    assert split_tile_budget([(448, 448), (1920, 1080), (800, 1300)], 16) == [12, 7, 12]
    assert split_tile_budget([(448, 448)] * 3, 3, min_num=1) == [12, 12, 12]


def test_budget_below_one_tile_each_is_refused(processor, picture):
    with pytest.raises(ValueError, match="max_total_patches=1 .* 2 images"):
        processor([picture, picture], max_total_patches=1)


def test_processor_budgets(processor, picture):
    alone = int(processor(picture)["num_patches"])
    assert alone == 7
    both = processor([picture, picture], max_total_patches=9)
    assert both["num_patches"].sum() <= 9 and len(both["pixel_values"]) == both["num_patches"].sum()
    divided = processor([picture, picture], divide_patches_by_images=True, max_num=6)
    assert torch.equal(
        divided["pixel_values"][: divided["num_patches"][0]], processor(picture, max_num=3).pixel_values
    )
    crowded = processor([picture] * 3, divide_patches_by_images=True, max_num=2, min_num=2)
    assert crowded["num_patches"].tolist() == [1, 1, 1]


def test_num_tiles_foretells_the_call(processor):
    sizes = [(90, 61), (28, 28), (300, 20)]
    for options in ({}, {"max_total_patches": 12}, {"dynamic_image_size": False}, {"use_thumbnail": False}):
        output = processor([synthetic(*size, seed=1) for size in sizes], **options)
        assert output["num_patches"].tolist() == processor.num_tiles_per_image(sizes, **options)


# --- loading ---------------------------------------------------------------------------------------------------------


def test_every_source_gives_the_same_pixels(tmp_path, picture):
    data = encoded(picture)
    (tmp_path / "a.png").write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    with open(tmp_path / "a.png", "rb") as file:
        images = [
            load_image(s) for s in (tmp_path / "a.png", str(tmp_path / "a.png"), data, io.BytesIO(data), url, file)
        ]
        assert not file.closed
    assert all(image.mode == "RGB" and np.array_equal(image, picture) for image in images)


@pytest.fixture
def server(picture):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/a.png" else 404)
            self.end_headers()
            self.wfile.write(encoded(picture) if self.path == "/a.png" else b"no")

        def log_message(self, *arguments):
            pass

    web = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{web.server_port}"
    web.shutdown()
    web.server_close()


def test_urls(server, picture, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert np.array_equal(load_image(f"{server}/a.png"), picture)
    with pytest.raises(ImageLoadError, match="404"):
        load_image(f"{server}/b.png")
    with pytest.raises(ImageLoadError, match="more than 10 bytes"):
        load_image(f"{server}/a.png", max_bytes=10)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, picture):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture, exif=exif)
    turned = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}[orientation]  # Image.Transpose values
    expected = picture if turned is None else picture.transpose(turned)
    assert np.array_equal(load_image(data), expected)
    assert np.array_equal(load_image(data, exif=False), picture)
    assert np.array_equal(load_image(Image.open(io.BytesIO(data))), picture)  # a given PIL image is not turned


def test_given_pil_image_is_returned_itself():
    image = Image.new("RGBA", (3, 2), (9, 8, 7, 6))
    assert load_image(image) is image


def test_sixteen_bits_are_scaled(processor):
    values = np.linspace(0, 65535, 90 * 61).reshape(61, 90).astype(np.uint16)
    expected = np.repeat(np.rint(values / 257).astype(np.uint8)[..., None], 3, axis=2)
    deep = Image.fromarray(values)
    assert deep.mode == "I;16"
    as_int = Image.fromarray(values.astype(np.int32))
    for loaded in (load_image(encoded(deep)), load_image(encoded(deep, "TIFF")), load_image(encoded(as_int, "TIFF"))):
        assert np.array_equal(loaded, expected)
    for given_image in (deep, as_int):
        assert torch.equal(processor(given_image).pixel_values, processor(Image.fromarray(expected)).pixel_values)
    dark_pgm = b"P5 2 1 65535\n" + struct.pack(">2H", 0, 200)
    assert np.asarray(load_image(dark_pgm))[0, :, 0].tolist() == [0, 1]
    assert tiling_internvl.to_rgb(Image.new("I", (1, 1), 200)).getpixel((0, 0)) == (200, 200, 200)


MODES = "1 L LA La P PA RGB RGBA RGBa RGBX CMYK YCbCr HSV LAB I I;16 I;16B I;16L F".split()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("exact", [True, False])
def test_every_mode_gives_tiles(mode, exact, processor):
    output = processor(Image.new(mode, (60, 30)), exact=exact)
    assert output["pixel_values"].shape == (3, 3, 28, 28) and output["pixel_values"].isfinite().all()


def test_transparency_is_dropped_as_pillow_does(processor, picture):
    alpha = picture.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(picture.size))
    palette = picture.quantize(16)
    palette.info["transparency"] = 3
    for image in (alpha, palette, alpha.convert("LA")):
        assert torch.equal(processor(image).pixel_values, processor(image.convert("RGB")).pixel_values)
        assert np.array_equal(load_image(encoded(image)), Image.open(io.BytesIO(encoded(image))).convert("RGB"))


@pytest.mark.parametrize(("size", "tiles"), [((1, 1), 1), ((20000, 1), 13), ((1, 20000), 13)])
@pytest.mark.parametrize("exact", [True, False])
def test_extreme_shapes(size, tiles, exact, processor):
    output = processor(
        load_image(encoded(Image.new("RGB", size, (255, 0, 127)))), exact=exact, normalize_type="siglip"
    )
    assert output["num_patches"].tolist() == [tiles]
    expected = torch.tensor([1.0, -1.0, 127 / 127.5 - 1]).view(3, 1, 1).expand(tiles, 3, 28, 28)
    torch.testing.assert_close(output["pixel_values"], expected)


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises many pixels and holds none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_bombs_are_refused_from_the_header(processor):
    with pytest.raises(ImageLoadError, match="MAX_IMAGE_PIXELS"):
        load_image(png_header(60000, 60000))
    with pytest.raises(ImageLoadError, match="2000x2000 pixels is over max_pixels=100"):
        processor(png_header(2000, 2000), max_pixels=100)
    with pytest.raises(ImageLoadError, match="over max_pixels"):
        InternVLImageProcessor(max_pixels=100)(Image.new("RGB", (11, 10)))
    assert processor(Image.new("RGB", (11, 10)), max_pixels=None).num_patches.tolist() == [1]


def test_load_errors_name_source_cause_and_fix(tmp_path, picture):
    broken = {"empty.png": b"", "text.png": b"not an image", "cut.png": encoded(picture)[:900]}
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
    causes = {"empty.png": "empty", "text.png": "not an image", "cut.png": "truncated", "missing.png": "No such file"}
    for name, cause in causes.items():
        with pytest.raises(ImageLoadError, match=f"{name}.*{cause}.*(again|Check)"):
            load_image(tmp_path / name)
    with pytest.raises(ImageLoadError, match="directory"):
        load_image(tmp_path)
    with pytest.raises(ImageLoadError, match="base64"):
        load_image("data:image/png,abc")
    with pytest.raises(ImageLoadError, match="truncated"):
        load_image(Image.open(io.BytesIO(broken["cut.png"])))
    with pytest.raises(TypeError, match="NoneType"):
        load_image(None)
    assert issubclass(ImageLoadError, ValueError)


# --- the processor ---------------------------------------------------------------------------------------------------


def test_arrays_equal_pil(processor, picture):
    array = np.asarray(picture)
    chw = torch.from_numpy(array.copy()).permute(2, 0, 1)
    expected = processor(picture).pixel_values
    for image in (array, chw, chw / 255, (chw / 255).double(), array[None], chw[None], array / 255):
        assert torch.equal(processor(image).pixel_values, expected)
    assert array_to_image(chw[:1]).mode == array_to_image(array[..., 0]).mode == "L"


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 40, 50), np.uint8), "height, width, channels"),
        (torch.zeros(40, 50, 3), "channels, height, width"),
        (torch.full((3, 4, 4), 2.0), r"\[0, 1\]"),
        (torch.full((3, 4, 4), float("nan")), r"\[0, 1\]"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
        (np.zeros((0, 4, 3), np.uint8), "positive"),
    ],
)
def test_bad_arrays_are_refused(array, message, processor):
    with pytest.raises(ValueError, match=message):
        processor(array)


def test_lists_and_nested_lists(processor, picture):
    other = synthetic(28, 28, seed=1)
    output = processor([[picture], [other, encoded(other)]])
    assert output["num_patches"].tolist() == [7, 1, 1] and output["num_patches"].dtype == torch.int64
    assert torch.equal(output["pixel_values"][:7], processor(picture).pixel_values)
    assert processor([])["pixel_values"].shape == (0, 3, 28, 28)


def test_return_tensors(processor, picture):
    expected = processor(picture)["pixel_values"].numpy()
    assert np.array_equal(processor(picture, return_tensors="np")["pixel_values"], expected)
    plain = processor(picture, return_tensors=None)
    assert np.array_equal(plain["pixel_values"], expected) and plain["num_patches"] == [7]
    assert processor(picture, device="meta")["pixel_values"].is_meta
    with pytest.raises(ValueError, match="return_tensors"):
        processor(picture, return_tensors="tf")


def test_video_frames_are_one_tile_each(processor, picture):
    output = processor([picture] * 3, dynamic_image_size=False, max_total_patches=3)
    assert output["num_patches"].tolist() == [1, 1, 1]
    assert torch.equal(output["pixel_values"][0], processor(picture)["pixel_values"][-1])


def test_unknown_and_contradictory_arguments(processor, picture):
    with pytest.raises(TypeError, match="max_tiles"):
        processor(picture, max_tiles=3)
    with pytest.raises(TypeError, match="max_tiles"):
        InternVLImageProcessor(max_tiles=3)
    with pytest.raises(ValueError, match="do_normalize"):
        processor(picture, do_normalize=False)
    with pytest.raises(ValueError, match="same setting"):
        processor(picture, max_num=3, max_dynamic_patch=4)
    with pytest.raises(ValueError, match="same setting"):
        processor(picture, max_patches=3, max_dynamic_patch=4)
    with pytest.raises(ValueError, match="normalize_type"):
        processor(picture, normalize_type="imagnet")
    with pytest.raises(ValueError, match="square"):
        processor(picture, size={"height": 28, "width": 56})
    processor.normalize_type = "clip"
    with pytest.raises(ValueError, match="disagrees"):
        processor(picture)


def test_arguments_of_processor_mixin_are_tolerated(processor, picture):
    neutral = {"do_resize": True, "do_rescale": None, "data_format": "channels_first", "disable_grouping": True}
    assert torch.equal(processor(picture, **neutral).pixel_values, processor(picture).pixel_values)
    assert processor(picture, size={"height": 56, "width": 56}).pixel_values.shape[-1] == 56


def test_explicit_mean_and_names_override_each_other(processor, picture):
    clip_mean, clip_std = NORMALIZATIONS["clip"]
    explicit = InternVLImageProcessor(image_size=28, image_mean=list(clip_mean), image_std=list(clip_std))
    assert explicit.normalize_type == "clip"
    by_name = processor(picture, normalize_type="clip").pixel_values
    assert torch.equal(explicit(picture).pixel_values, by_name)
    assert not torch.equal(explicit(picture, normalize_type="siglip").pixel_values, by_name)
    assert InternVLImageProcessor(image_mean=0.5).normalize_type == "custom"


def test_fetch_images_keeps_nesting(processor, picture):
    array = np.asarray(picture)
    fetched = processor.fetch_images([[encoded(picture)], [picture, array]])
    assert np.array_equal(fetched[0][0], picture) and fetched[1][0] is picture and fetched[1][1] is array


def test_fast_backend_stays_near_the_exact_one():
    processor = InternVLImageProcessor(normalize_type="siglip", max_dynamic_patch=6)
    for name in ("china.jpg", "flower.jpg"):
        image = Image.fromarray(load_sample_image(name))
        for picture in (image, image.rotate(90, expand=True).resize((427, 1100))):
            exact, fast = (processor(picture, exact=value)["pixel_values"] for value in (True, False))
            difference = ((exact - fast) * 127.5).round().abs()
            assert difference.max() <= 2 and 0 < difference.mean() < 0.02


# --- saving ----------------------------------------------------------------------------------------------------------


def test_saved_settings_come_back(tmp_path, picture):
    changed = {
        "image_size": 56,
        "min_dynamic_patch": 2,
        "max_dynamic_patch": 5,
        "use_thumbnail": False,
        "dynamic_image_size": True,
        "normalize_type": "clip",
        "pad2square": True,
        "no_upscale": True,
        "max_total_patches": 30,
        "divide_patches_by_images": True,
        "max_pixels": 10**6,
        "exact": False,
    }
    processor = InternVLImageProcessor(**changed)
    processor.save_pretrained(tmp_path)
    again = InternVLImageProcessor.from_pretrained(tmp_path)
    assert {name: getattr(again, name) for name in changed} == changed
    assert again.to_dict() == processor.to_dict()
    assert torch.equal(again(picture).pixel_values, processor(picture).pixel_values)
    other = InternVLImageProcessor.from_pretrained(tmp_path, max_num=3, normalize_type="siglip")
    assert (other.max_dynamic_patch, other.image_mean, other.normalize_type) == (3, [0.5] * 3, "siglip")


def test_released_configuration_loads(tmp_path, picture):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(LEGACY))
    processor = InternVLImageProcessor.from_pretrained(tmp_path)
    assert processor.image_size == 448 and processor.image_mean == LEGACY["image_mean"]
    assert processor.normalize_type == "imagenet" and not hasattr(processor, "crop_size")
    assert torch.equal(processor(picture).pixel_values, InternVLImageProcessor()(picture).pixel_values)
    small = LEGACY | {"image_mean": [0.1, 0.2, 0.3], "size": 224, "some_new_key": 1}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(small))
    processor = InternVLImageProcessor.from_pretrained(tmp_path)
    assert (processor.image_size, processor.normalize_type) == (224, "custom")
    assert processor.image_mean == [0.1, 0.2, 0.3]


def test_loads_as_remote_code(tmp_path, picture):
    folder = tmp_path / "checkpoint_image_processing_remote"
    InternVLImageProcessor(image_size=28, max_dynamic_patch=4).save_pretrained(folder)
    assert {"image_processing_internvl.py", "tiling_internvl.py"} <= {file.name for file in folder.iterdir()}
    remote = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    assert type(remote) is not InternVLImageProcessor and remote.max_dynamic_patch == 4
    local = InternVLImageProcessor(image_size=28, max_dynamic_patch=4)
    assert torch.equal(remote(picture).pixel_values, local(picture).pixel_values)


def test_import_is_silent_and_needs_no_torchvision():
    folder = Path(image_processing_internvl.__file__).parent
    code = (
        "import sys, types; sys.modules['torchvision'] = None\n"
        f"package = types.ModuleType('p'); package.__path__ = [{str(folder)!r}]; sys.modules['p'] = package\n"
        "from p.image_processing_internvl import InternVLImageProcessor"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
