"""From any image source to PIL tiles: loading, the grid search and the tile budget.

This file owns `load_image` (paths, URLs, bytes, files) and every decision about how many tiles an image becomes.
It deliberately does no normalisation and builds no tensors: `image_processing_internvl.py` does that.
"""

import base64
import binascii
import functools
import http.client
import io
import os
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

MAX_PIXELS = 178_956_970
"""Default pixel limit: where Pillow itself refuses an image as a decompression bomb (a 0.5 GiB RGB image)."""

MAX_DOWNLOAD_BYTES = 256 * 2**20

Grid = tuple[int, int]


class ImageLoadError(ValueError):
    """An image that cannot be used; the message names the source, the cause and the fix.

    Args:
        label: The source. A DataLoader raises the error of a worker again with the whole message as its only argument.
        cause: What is wrong; kept as text, because not every exception can be pickled.
        fix: How to put it right.
    """

    def __init__(self, label: str, cause: object = None, fix: str = "") -> None:
        self.label, self.cause, self.fix = label, None if cause is None else str(cause), fix
        super().__init__(self.label, self.cause, self.fix)

    def __str__(self) -> str:
        return self.label if self.cause is None else f"cannot load image {self.label}: {self.cause}. {self.fix}"


# --- loading ---------------------------------------------------------------------------------------------------------


def load_image(
    source: Any,
    *,
    exif: bool = True,
    max_pixels: int | None = MAX_PIXELS,
    timeout: float = 30.0,
    max_bytes: int = MAX_DOWNLOAD_BYTES,
) -> Image.Image:
    """Load one image, fully decoded, as 8-bit RGB.

    Args:
        source: path, `http(s)://` URL, base64 `data:` URL, bytes, binary file object, or a PIL image. A PIL image is
            returned as it is (decoded and checked, but neither rotated nor converted).
        exif: turn the image as its EXIF orientation says.
        max_pixels: most pixels (width times height) accepted, read from the header before decoding; `None` leaves
            only Pillow's own limit.
        timeout: seconds that a download may stall.
        max_bytes: largest download accepted.

    Animations give their first frame; modes are converted as in `to_rgb`.

    Raises:
        ImageLoadError: missing, empty, corrupt, truncated, unsupported, too large, or not downloadable.
        TypeError: `source` is none of the above.
    """
    if isinstance(source, Image.Image):
        return _decode(source, f"<PIL image {source.width}x{source.height}>", max_pixels)
    label = _describe(source)
    with _opened(source, label, timeout, max_bytes) as stream:
        image = _decode(_parse_header(stream, label), label, max_pixels)
    return to_rgb(_upright(image, label) if exif else image)


def read_image_size(
    source: Any, *, exif: bool = True, timeout: float = 30.0, max_bytes: int = MAX_DOWNLOAD_BYTES
) -> tuple[int, int]:
    """Width and height in pixels that `load_image` gives, from the header where the format allows.

    Arguments and errors as there; damage behind the header goes unnoticed.
    """
    if isinstance(source, Image.Image):
        return source.size
    label = _describe(source)
    with _opened(source, label, timeout, max_bytes) as stream:
        image = _parse_header(stream, label)
        swapped = exif and _orientation(image, label) in (5, 6, 7, 8)
        return (image.height, image.width) if swapped else image.size


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: as Pillow's `convert("RGB")` (alpha is dropped), but 16-bit greys are scaled instead of clipped.

    Mode "I" has 32 bits: it counts as 16-bit when its file format says so (PNG, PPM) or a value exceeds 255. Mode "F"
    is clipped to 0..255 like Pillow does.
    """
    if image.mode == "RGB":
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _grey_to_eight_bits(image)
    elif image.mode == "La":  # Pillow has no direct way from premultiplied grey
        image = image.convert("LA")
    return image.convert("RGB")


def _grey_to_eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "I" and image.format not in ("PNG", "PPM") and values.max() <= 255:
        return image.convert("L")
    scaled = (np.clip(values, 0, 65535).astype(np.uint32) * 255 + 32767) // 65535
    return Image.fromarray(scaled.astype(np.uint8))


def _describe(source: Any) -> str:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"<{len(source)} bytes>"
    if hasattr(source, "read"):
        return f"<file {getattr(source, 'name', type(source).__name__)}>"
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"an image must be a path, URL, bytes, file object or PIL image, not {type(source).__name__}; "
            "convert arrays with PIL.Image.fromarray, or give them to InternVLImageProcessor"
        )
    text = os.fspath(source)
    return repr(text if len(text) <= 200 else text[:60] + "...")


@contextmanager
def _opened(source: Any, label: str, timeout: float, max_bytes: int) -> Iterator[Any]:
    """A binary stream over `source`; only what was opened here is closed here."""
    if hasattr(source, "read"):
        yield source
    elif isinstance(source, (bytes, bytearray, memoryview)):
        yield io.BytesIO(source)
    elif os.fspath(source)[:8].lower().startswith(("http://", "https://")):
        yield io.BytesIO(_download(os.fspath(source), label, timeout, max_bytes))
    elif os.fspath(source).startswith("data:"):
        yield io.BytesIO(_data_url_bytes(os.fspath(source), label))
    else:
        try:
            file = open(source, "rb")
        except (OSError, ValueError) as error:
            raise ImageLoadError(label, getattr(error, "strerror", None) or error, "Check the path.") from error
        with file:
            yield file


def _download(url: str, label: str, timeout: float, max_bytes: int) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "internvl"})  # some hosts refuse urllib's own name
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            data = response.read(max_bytes + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ImageLoadError(label, error, "Check the URL, or download the file and give its path.") from error
    if len(data) > max_bytes:
        raise ImageLoadError(label, f"more than {max_bytes} bytes", "Download it and give its path.")
    return data


def _data_url_bytes(url: str, label: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise ImageLoadError(label, "not a base64 data URL", 'It must read "data:image/png;base64,...".')
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageLoadError(label, f"invalid base64 ({error})", "Encode the file's bytes again.") from error


def _parse_header(stream: Any, label: str) -> Image.Image:
    try:
        return Image.open(stream)
    except Image.DecompressionBombError as error:
        fix = "Shrink the image, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it."
        raise ImageLoadError(label, error, fix) from error
    except UnidentifiedImageError as error:
        stream.seek(0)
        cause = "not an image that Pillow can read" if stream.read(1) else "it is empty (0 bytes)"
        raise ImageLoadError(label, cause, "Fetch or export the file again, as PNG or JPEG.") from error
    except Exception as error:  # Pillow's format plugins raise many types on bad headers
        raise ImageLoadError(label, error, "Fetch or export the file again.") from error


def _decode(image: Image.Image, label: str, max_pixels: int | None) -> Image.Image:
    pixels = image.width * image.height
    if max_pixels is not None and pixels > max_pixels:
        fix = "Shrink the image, or raise max_pixels if you trust it."
        raise ImageLoadError(label, f"{image.width}x{image.height} pixels is over max_pixels={max_pixels}", fix)
    try:
        image.load()
    except Exception as error:  # as above: decoders raise OSError, SyntaxError, struct.error, zlib.error, ...
        raise ImageLoadError(label, f"damaged or truncated ({error})", "Fetch or export the file again.") from error
    return image


def _upright(image: Image.Image, label: str) -> Image.Image:
    try:
        ImageOps.exif_transpose(image, in_place=True)  # in place, because a copy forgets its file format
    except Exception as error:  # damaged EXIF fails in many ways
        raise ImageLoadError(label, f"unreadable EXIF data ({error})", "Pass exif=False to ignore it.") from error
    return image


def _orientation(image: Image.Image, label: str) -> int:
    """The EXIF orientation, 1 to 8; 1 if there is none."""
    try:
        # Pillow decodes a whole PNG to see whether EXIF data follow the pixels; most have none there.
        plain = isinstance(image, PngImagePlugin.PngImageFile) and not _has_late_chunks(image.fp)
        exif = Image.Image.getexif(image) if plain else image.getexif()
        return exif.get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # as in _upright
        raise ImageLoadError(label, f"unreadable EXIF data ({error})", "Pass exif=False to ignore it.") from error


def _has_late_chunks(stream: Any) -> bool:
    """Whether a PNG stream has chunks with EXIF data or text behind its first pixels; its position is kept."""
    position, data_seen = stream.tell(), False
    try:
        stream.seek(8)
        while len(head := stream.read(8)) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            data_seen |= kind == b"IDAT"
            if data_seen and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            stream.seek(length + 4, io.SEEK_CUR)
        return False
    finally:
        stream.seek(position)


# --- grid ------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def candidate_grids(min_num: int, max_num: int) -> tuple[Grid, ...]:
    """Every (columns, rows) of `min_num` to `max_num` tiles, in the total order (tiles, columns)."""
    grids = [(i, j) for i in range(1, max_num + 1) for j in range(1, max_num // i + 1) if i * j >= min_num]
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0])))


def check_tile_range(min_num: int, max_num: int, image_size: int) -> None:
    """Raise `ValueError`, naming argument and fix, unless 1 <= min_num <= max_num and image_size >= 1."""
    if min_num < 1:
        raise ValueError(f"min_num (min_dynamic_patch) must be at least 1, got {min_num}; use 1 for no minimum")
    if max_num < min_num:
        raise ValueError(
            f"max_num (max_dynamic_patch) is {max_num}, below min_num (min_dynamic_patch) {min_num}; "
            "raise max_num or lower min_num"
        )
    if image_size < 1:
        raise ValueError(f"image_size must be a positive number of pixels, got {image_size}; released models use 448")


def find_grid(
    width: int,
    height: int,
    min_num: int = 1,
    max_num: int = 12,
    image_size: int = 448,
    *,
    no_upscale: bool = False,
) -> Grid:
    """The (columns, rows) whose ratio is nearest to the image's (InternVL 1.5, arXiv 2404.16821, section 3.2).

    Of equally near ratios the later one, in the order of `candidate_grids`, wins if the image has more than half of
    its canvas's pixels (original: `find_closest_aspect_ratio` in internvl_chat/internvl/train/dataset.py). The ratio
    decides alone otherwise, so a small image may be enlarged a lot: 640x480 becomes 4x3 tiles.

    Args:
        width, height: image size in pixels.
        min_num, max_num: fewest and most tiles, thumbnail not counted.
        image_size: edge of a tile in pixels.
        no_upscale: use at most `max(1, floor(width / image_size + 1/2))` columns, and rows likewise, so that beyond
            one tile no edge is enlarged by more than a third. Where that leaves fewer than `min_num` tiles, all grids
            of exactly `min_num` tiles are searched instead.
    """
    check_tile_range(min_num, max_num, image_size)
    if width < 1 or height < 1:
        raise ValueError(f"width and height must be positive, got {width}x{height}; drop empty images")
    grids = candidate_grids(min_num, max_num)
    if no_upscale:
        grids = _without_upscaling(grids, width, height, image_size)
    ratio, area = width / height, width * height
    best, best_difference = (1, 1), float("inf")
    for columns, rows in grids:
        difference = abs(ratio - columns / rows)
        larger_fits = area > 0.5 * image_size * image_size * columns * rows
        if difference < best_difference or (difference == best_difference and larger_fits):
            best, best_difference = (columns, rows), difference
    return best


def _without_upscaling(grids: tuple[Grid, ...], width: int, height: int, image_size: int) -> tuple[Grid, ...]:
    columns, rows = (max(1, (2 * edge + image_size) // (2 * image_size)) for edge in (width, height))
    fitting = tuple(grid for grid in grids if grid[0] <= columns and grid[1] <= rows)
    fewest = grids[0][0] * grids[0][1]
    return fitting or tuple(grid for grid in grids if grid[0] * grid[1] == fewest)


def tile_count(grid: Grid, use_thumbnail: bool) -> int:
    """Tiles that a grid yields: one each, and a thumbnail unless there is only one."""
    tiles = grid[0] * grid[1]
    return tiles + (use_thumbnail and tiles > 1)


def resizes_vertically_first(source: tuple[int, int], target: tuple[int, int]) -> bool:
    """Which pass of a (width, height) resize comes first; each pass rounds to 8 bits, so the order changes pixels.

    This is what Pillow 13 does (found by probing it on 1480 sizes); older ones always start with the rows. Stating it
    here makes the pixels independent of the installed version and lets other backends follow.
    """
    removed_columns, removed_rows = source[0] - target[0], source[1] - target[1]
    return removed_rows > 2 * max(0, removed_columns)


def resize_bicubic(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Pillow's antialiased bicubic resize to (width, height), with the same pixels on every Pillow version."""
    if resizes_vertically_first(image.size, size):
        image = image.resize((image.width, size[1]), Image.Resampling.BICUBIC)
    return image.resize(size, Image.Resampling.BICUBIC)


def dynamic_preprocess(
    image: Image.Image,
    min_num: int = 1,
    max_num: int = 12,
    image_size: int = 448,
    use_thumbnail: bool = False,
) -> list[Image.Image]:
    """Cut an image into `image_size` x `image_size` RGB tiles, row by row, with the thumbnail last.

    Pixels equal those of the original `dynamic_preprocess` (internvl_chat/internvl/train/dataset.py) on an RGB image;
    other modes are made RGB first, as its callers do.
    """
    image = to_rgb(image)
    columns, rows = find_grid(image.width, image.height, min_num, max_num, image_size)
    canvas = resize_bicubic(image, (columns * image_size, rows * image_size))
    corners = [(x * image_size, y * image_size) for y in range(rows) for x in range(columns)]
    tiles = [canvas.crop((x, y, x + image_size, y + image_size)) for x, y in corners]
    if use_thumbnail and len(tiles) > 1:
        tiles.append(resize_bicubic(image, (image_size, image_size)))
    return tiles


# --- budget ----------------------------------------------------------------------------------------------------------


def divided_max_num(max_num: int, n_images: int) -> int:
    """The original's rule for several images in one sample: `max(1, max_num // n_images)` each, thumbnails on top."""
    return max(1, max_num // max(1, n_images))


def split_tile_budget(
    sizes: Sequence[tuple[int, int]],
    total: int,
    *,
    min_num: int = 1,
    max_num: int = 12,
    image_size: int = 448,
    use_thumbnail: bool = True,
    no_upscale: bool = False,
) -> list[int]:
    """A `max_num` for each image, such that all tiles, thumbnails included, are at most `total`.

    Every image starts with the grid it would get alone. While there are too many tiles, the image that has the most
    (of equals, the last) is capped one below its present grid. So small images keep their detail, large ones share
    the shortage, and an image never falls below one tile; a cap below `min_num` lowers `min_num` for that image. As
    grids come in steps, a part of the budget may stay unused.

    Args:
        sizes: (width, height) of each image in pixels.
        total: most tiles in all.

    Raises:
        ValueError: `total` is smaller than the number of images.
    """
    if total < len(sizes):
        raise ValueError(
            f"max_total_patches={total} cannot hold {len(sizes)} images of at least one tile each; "
            "raise it or give fewer images"
        )

    def grid(index: int) -> Grid:
        width, height = sizes[index]
        cap = caps[index]
        return find_grid(width, height, min(min_num, cap), cap, image_size, no_upscale=no_upscale)

    caps = [max_num] * len(sizes)
    grids = [grid(index) for index in range(len(sizes))]
    tiles = [tile_count(one, use_thumbnail) for one in grids]
    while sum(tiles) > total:
        largest = max(range(len(tiles)), key=lambda index: (tiles[index], index))
        caps[largest] = grids[largest][0] * grids[largest][1] - 1
        grids[largest] = grid(largest)
        tiles[largest] = tile_count(grids[largest], use_thumbnail)
    return caps
