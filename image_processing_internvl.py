"""Image processor of InternVL: images of any kind to normalised tiles, `(tiles, 3, size, size)` float32.

`exact=True` (the default) gives the bits of the original preprocessing; `exact=False` resizes with torch and is
several times faster. How an image is loaded and how many tiles it becomes is decided in `tiling_internvl.py`; what
the tiles mean as tokens is not known here.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Unpack

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.processing_utils import ImagesKwargs
from transformers.utils import logging

from .tiling_internvl import (
    MAX_PIXELS,
    Grid,
    ImageLoadError,
    check_tile_range,
    divided_max_num,
    dynamic_preprocess,
    find_grid,
    load_image,
    resize_bicubic,
    resizes_vertically_first,
    split_tile_budget,
    tile_count,
    to_rgb,
)

__all__ = [
    "MAX_PIXELS",
    "NORMALIZATIONS",
    "ImageLoadError",
    "ImageSettings",
    "InternVLImageProcessor",
    "InternVLImagesKwargs",
    "array_to_image",
    "dynamic_preprocess",
    "find_grid",
    "load_image",
    "split_tile_budget",
]

logger = logging.get_logger(__name__)

Triple = tuple[float, float, float]
TileTransform = Callable[[Image.Image], Image.Image]

NORMALIZATIONS: dict[str, tuple[Triple, Triple]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.4814546, 0.4578275, 0.40821073), (0.2686295, 0.2613025, 0.2757711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation per channel, in units of [0, 1], under the names that checkpoints use."""


@dataclass(frozen=True)
class ImageSettings:
    """Every saved field of `InternVLImageProcessor`, validated; the processor's docstring explains them."""

    image_size: int = 448
    min_dynamic_patch: int = 1
    max_dynamic_patch: int = 12
    use_thumbnail: bool = True
    dynamic_image_size: bool = True
    normalize_type: str | None = "imagenet"
    image_mean: Sequence[float] | None = None
    image_std: Sequence[float] | None = None
    pad2square: bool = False
    no_upscale: bool = False
    max_total_patches: int | None = None
    divide_patches_by_images: bool = False
    max_pixels: int | None = MAX_PIXELS
    exact: bool = True

    def __post_init__(self) -> None:
        check_tile_range(self.min_dynamic_patch, self.max_dynamic_patch, self.image_size)
        for name in ("max_total_patches", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}; use None for no limit")
        self._resolve_normalization()

    def _resolve_normalization(self) -> None:
        if self.normalize_type not in (None, "custom", *NORMALIZATIONS):
            raise ValueError(
                f"normalize_type must be one of {', '.join(NORMALIZATIONS)}, got {self.normalize_type!r}; "
                "for other values give image_mean and image_std"
            )
        mean, std = NORMALIZATIONS.get(self.normalize_type or "", (None, None))
        chosen = (_triple("image_mean", self.image_mean, mean), _triple("image_std", self.image_std, std))
        if mean is not None and chosen != (mean, std):
            raise ValueError(
                f"normalize_type={self.normalize_type!r} disagrees with image_mean and image_std; "
                "give normalize_type as an argument instead of assigning it, or assign all three"
            )
        if min(chosen[1]) <= 0:
            raise ValueError(f"image_std must be positive, got {chosen[1]}")
        name = next((name for name, pair in NORMALIZATIONS.items() if pair == chosen), "custom")
        for field, value in (("image_mean", chosen[0]), ("image_std", chosen[1]), ("normalize_type", name)):
            object.__setattr__(self, field, value)


def _triple(name: str, value: float | Sequence[float] | None, default: Triple | None) -> Triple:
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"{name} is missing; give it, or a normalize_type")
    values = [value] * 3 if isinstance(value, (int, float)) else list(value)
    if len(values) != 3:
        raise ValueError(f"{name} needs 3 values (red, green, blue), got {len(values)}")
    return (float(values[0]), float(values[1]), float(values[2]))


class InternVLImagesKwargs(ImagesKwargs, total=False):
    """Arguments of the processor and of each call: the fields of `ImageSettings` and their aliases."""

    image_size: int | None
    min_dynamic_patch: int | None
    max_dynamic_patch: int | None
    min_num: int | None
    max_num: int | None
    min_patches: int | None
    max_patches: int | None
    crop_to_patches: bool | None
    use_thumbnail: bool | None
    dynamic_image_size: bool | None
    normalize_type: str | None
    pad2square: bool | None
    no_upscale: bool | None
    max_total_patches: int | None
    divide_patches_by_images: bool | None
    max_pixels: int | None
    exact: bool | None


_FIELDS = frozenset(field.name for field in fields(ImageSettings))
_NULLABLE = ("max_total_patches", "max_pixels")  # None is a value here; elsewhere it means "not given"
_ALIASES = {
    "min_num": "min_dynamic_patch",
    "max_num": "max_dynamic_patch",
    "size": "image_size",
    "min_patches": "min_dynamic_patch",  # these three: transformers' own InternVL
    "max_patches": "max_dynamic_patch",
    "crop_to_patches": "dynamic_image_size",
}
_ALWAYS = {  # arguments of other processors that may only say what this one always does
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "do_pad": False,
    "resample": Image.Resampling.BICUBIC,
    "rescale_factor": 1 / 255,
    "data_format": "channels_first",
}
_DEAD = frozenset(ImagesKwargs.__annotations__) | {  # the CLIP keys of released repositories, and loader bookkeeping
    "auto_map",
    "feature_extractor_type",
    "image_processor_type",
    "processor_class",
}


def _canonical(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments under their field names: aliases resolved, dead keys and unset values dropped.

    Raises `TypeError` for unknown names, `ValueError` for two values of one field or for what cannot be switched off.
    """
    unknown = sorted(set(arguments) - _FIELDS - set(_ALIASES) - _DEAD)
    if unknown:
        raise TypeError(f"InternVLImageProcessor has no argument {', '.join(unknown)}; it has {sorted(_FIELDS)}")
    settings: dict[str, Any] = {}
    for name, value in arguments.items():
        if value is None and name not in _NULLABLE:
            continue
        if name in _ALWAYS and value != _ALWAYS[name]:
            raise ValueError(f"{name}={value!r} is not supported: it is always {_ALWAYS[name]!r}; leave it out")
        field = _ALIASES.get(name, name)
        if field not in _FIELDS:
            continue
        value = _edge(value) if name == "size" else value
        if settings.setdefault(field, value) != value:
            raise ValueError(f"{name} and {field} are the same setting with two values; give one")
    return settings


def _edge(size: int | Sequence[int] | dict[str, int]) -> int:
    if isinstance(size, int):
        return size
    edges = set(size.values() if hasattr(size, "values") else size)
    if len(edges) != 1:
        raise ValueError(f"tiles are square, got size={size}; give one number")
    return edges.pop()


def _override(settings: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """`settings` with `arguments` over them; a mean or std given outweighs a name, a name alone replaces both."""
    changes = _canonical(arguments)
    if "image_mean" in changes or "image_std" in changes:
        changes["normalize_type"] = None
    elif "normalize_type" in changes:
        changes |= {"image_mean": None, "image_std": None}
    return settings | changes


class InternVLImageProcessor(BaseImageProcessor):
    """Cuts images into tiles as InternVL 1.5 and later do (arXiv 2404.16821, section 3.2) and normalises them.

    Source: InternVL internvl_chat/internvl/train/dataset.py, `dynamic_preprocess` and `build_transform`. Every
    argument is saved, and can be overridden per call.

    Args:
        image_size: edge of a tile, pixels.
        min_dynamic_patch, max_dynamic_patch (aliases `min_num`, `max_num`; `min_patches`, `max_patches`): fewest and
            most tiles of an image, thumbnail not counted.
        use_thumbnail: append the whole image as one more tile, last, unless there is one tile only.
        dynamic_image_size (alias `crop_to_patches`): tile by aspect ratio; `False` gives one tile and no thumbnail
            (video frames).
        normalize_type: "imagenet", "clip" or "siglip"; reads "custom" for other means.
        image_mean, image_std: per channel, in units of [0, 1]; they outweigh `normalize_type`.
        pad2square: centre the image on a square of its mean colour before resizing. The original does so per tile,
            where it changes nothing, so it has an effect only with `dynamic_image_size=False`.
        no_upscale: do not spread small images over many tiles; the exact rule is at `find_grid`.
        max_total_patches: most tiles, thumbnails included, of all images of one call (`split_tile_budget`).
        divide_patches_by_images: `max(1, max_dynamic_patch // images)` tiles each, as the original trains.
        max_pixels: larger images are refused before they are decoded; `None` for no limit.
        exact: `True`: bit-identical to the original. `False`: torch's uint8 antialiased bicubic resize, over 3 times
            faster in all; a channel moves by at most 2/255 and by 0.013/255 on average (14 photographs, patterns and
            noise images, up to 4000x3000).
    """

    model_input_names = ["pixel_values", "num_patches"]
    valid_kwargs = InternVLImagesKwargs

    def __init__(self, **kwargs: Unpack[InternVLImagesKwargs]) -> None:
        auto_map = kwargs.get("auto_map")
        super().__init__(**({"auto_map": auto_map} if auto_map else {}))
        settings = ImageSettings(**_override(asdict(ImageSettings()), dict(kwargs)))
        for name, value in asdict(settings).items():
            setattr(self, name, list(value) if isinstance(value, tuple) else value)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> "InternVLImageProcessor":
        """Build from a saved dictionary; keys that nobody knows are dropped with a warning.

        Files of transformers' own InternVL say `crop_to_patches` false though its processor tiles all the same: that
        field of theirs is not read.
        """
        if str(image_processor_dict.get("image_processor_type", "")).startswith("GotOcr2"):
            image_processor_dict = {k: v for k, v in image_processor_dict.items() if k != "crop_to_patches"}
        known = _FIELDS | set(_ALIASES) | _DEAD
        unknown = sorted(set(image_processor_dict) - known)
        if unknown:
            logger.warning(f"InternVLImageProcessor ignores {unknown} of the saved configuration")
        saved = {name: value for name, value in image_processor_dict.items() if name not in unknown}
        changes = {name: kwargs.pop(name) for name in list(kwargs) if name in cls.valid_kwargs.__annotations__}
        settings = _override(_canonical(saved), changes)
        auto_map = {"auto_map": saved["auto_map"]} if "auto_map" in saved else {}
        return super().from_dict(settings | auto_map, **kwargs)

    def preprocess(
        self,
        images: Any,
        *,
        return_tensors: str | None = "pt",
        device: str | torch.device | None = None,
        tile_transform: TileTransform | None = None,
        **kwargs: Unpack[InternVLImagesKwargs],
    ) -> BatchFeature:
        """Tiles of one image or of a (nested) list of images.

        Args:
            images: what `load_image` takes, numpy arrays (height, width[, channels]) or torch tensors
                (channels, height, width), uint8 or float in [0, 1]; 4-dimensional arrays are batches.
            return_tensors: "pt", "np", or `None` (an array and a list).
            device: where torch tensors go.
            tile_transform: applied to every tile before normalisation, an augmentation in training; gets and returns
                an RGB PIL image of image_size x image_size.
            **kwargs: any field, for this call.

        Returns:
            `pixel_values`: float32 (tiles, 3, image_size, image_size), image after image;
            `num_patches`: int64 (images,), tiles of each image.

        Raises:
            ImageLoadError: an image cannot be read. ValueError: a bad value, or too small a budget. TypeError: an
                unknown argument or kind of image.
        """
        settings = self._settings(kwargs)
        pictures = [to_rgb(_as_image(image, settings.max_pixels)) for image in _flatten(images)]
        grids = _choose_grids([picture.size for picture in pictures], settings)
        counts = [_count(grid, settings) for grid in grids]
        pixels = np.empty((sum(counts), 3, settings.image_size, settings.image_size), dtype=np.float32)
        start = 0
        for picture, grid, count in zip(pictures, grids, counts, strict=True):
            _fill_tiles(picture, grid, settings, pixels[start : start + count], tile_transform)
            start += count
        return _as_batch(pixels, counts, return_tensors, device)

    def num_tiles(self, width: int, height: int, **overrides: Any) -> int:
        """Tiles, thumbnail included, of one image of this size (pixels), found without decoding anything."""
        return self.num_tiles_per_image([(width, height)], **overrides)[0]

    def num_tiles_per_image(self, sizes: Sequence[tuple[int, int]], **overrides: Any) -> list[int]:
        """Tiles of each image of one call, from their (width, height) alone; budgets are taken into account."""
        settings = self._settings(overrides)
        return [_count(grid, settings) for grid in _choose_grids(sizes, settings)]

    def grids_per_image(self, sizes: Sequence[tuple[int, int]], **overrides: Any) -> list[Grid]:
        """(columns, rows) of the tiles of each image of one call, thumbnail aside; as `num_tiles_per_image`."""
        return _choose_grids(sizes, self._settings(overrides))

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Load sources with `load_image`, keeping the nesting; arrays pass. `ProcessorMixin` calls this first."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(item) for item in image_url_or_urls]
        if isinstance(image_url_or_urls, (np.ndarray, torch.Tensor)):
            return image_url_or_urls
        return load_image(image_url_or_urls, max_pixels=self.max_pixels)

    def _settings(self, arguments: dict[str, Any]) -> ImageSettings:
        return ImageSettings(**_override({name: getattr(self, name) for name in _FIELDS}, arguments))


# --- images in -------------------------------------------------------------------------------------------------------


def _flatten(images: Any) -> list[Any]:
    if isinstance(images, (list, tuple)):
        nested = any(isinstance(item, (list, tuple)) for item in images)  # then None is a row without images
        return [image for item in images if not (nested and item is None) for image in _flatten(item)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


def _as_image(image: Any, max_pixels: int | None) -> Image.Image:
    if isinstance(image, (np.ndarray, torch.Tensor)):
        image = array_to_image(image)
    return load_image(image, max_pixels=max_pixels)


def array_to_image(array: np.ndarray | torch.Tensor) -> Image.Image:
    """PIL image of a numpy (height, width[, 1|3|4]) or torch ([1|3|4,] height, width) array, uint8 or in [0, 1]."""
    layout = "numpy images are (height, width, channels)"
    if isinstance(array, torch.Tensor):
        layout = "torch images are (channels, height, width)"
        array = array.detach().cpu().movedim(0, -1) if array.ndim == 3 else array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        raise ValueError(f"{layout}, with 1, 3 or 4 channels; got {array.shape} with channels last; transpose it")
    if np.issubdtype(array.dtype, np.floating):
        if array.size and not (array.min() >= 0 and array.max() <= 1):  # also refuses NaN
            raise ValueError("float images must lie in [0, 1]; divide by 255, or give uint8")
        array = np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"image arrays must be uint8 or float in [0, 1], got {array.dtype}; convert them")
    return Image.fromarray(np.ascontiguousarray(array))


# --- tiles out -------------------------------------------------------------------------------------------------------


def _choose_grids(sizes: Sequence[tuple[int, int]], settings: ImageSettings) -> list[Grid]:
    """One grid per image, under every cap and budget of the settings."""
    lowest, most = settings.min_dynamic_patch, settings.max_dynamic_patch
    if not settings.dynamic_image_size:
        lowest, most = 1, 1
    elif settings.divide_patches_by_images:
        most = divided_max_num(most, len(sizes))
    lowest = min(lowest, most)
    caps = [most] * len(sizes)
    options = {"image_size": settings.image_size, "no_upscale": settings.no_upscale}
    if settings.max_total_patches is not None:
        caps = split_tile_budget(
            sizes,
            settings.max_total_patches,
            min_num=lowest,
            max_num=most,
            use_thumbnail=settings.use_thumbnail,
            **options,
        )
    return [
        find_grid(width, height, min(lowest, cap), cap, **options)
        for (width, height), cap in zip(sizes, caps, strict=True)
    ]


def _count(grid: Grid, settings: ImageSettings) -> int:
    return tile_count(grid, settings.use_thumbnail)


def _fill_tiles(
    image: Image.Image, grid: Grid, settings: ImageSettings, out: np.ndarray, transform: TileTransform | None = None
) -> None:
    """Write the tiles of an RGB image, thumbnail last, to `out` (tiles, 3, size, size)."""
    columns, rows = grid
    size, tiles = settings.image_size, columns * rows
    if settings.pad2square and not settings.dynamic_image_size:
        image = _pad_to_square(image, settings.image_mean)
    views = [(out[:tiles], columns, rows)]
    if len(out) > tiles:
        views.append((out[tiles:], 1, 1))
    shapes = [(width * size, height * size) for _, width, height in views]
    resize = _resize_exact if settings.exact else _resize_fast
    for (view, width, _), planes in zip(views, resize(image, shapes), strict=True):
        if transform is not None:
            planes = _transformed(planes, size, transform)
        _write_normalized(planes, width, settings, view)


def _transformed(planes: list[np.ndarray], size: int, transform: TileTransform) -> list[np.ndarray]:
    """The planes (height, width) after `transform` of each tile, row by row."""
    pixels = np.stack(planes, axis=-1)
    for top in range(0, pixels.shape[0], size):
        for left in range(0, pixels.shape[1], size):
            tile = pixels[top : top + size, left : left + size]
            tile[...] = np.asarray(transform(Image.fromarray(tile)))
    return list(np.moveaxis(pixels, -1, 0))


def _pad_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    edge = max(image.size)
    square = Image.new("RGB", (edge, edge), tuple(int(value * 255) for value in mean))
    square.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    return square


def _resize_exact(image: Image.Image, shapes: list[tuple[int, int]]) -> list[list[np.ndarray]]:
    return [[np.asarray(band) for band in resize_bicubic(image, shape).split()] for shape in shapes]


def _resize_fast(image: Image.Image, shapes: list[tuple[int, int]]) -> list[list[np.ndarray]]:
    # np.array, not asarray: torch warns about the read-only view. Channels last is the layout of torch's fast kernel.
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    resized = []
    for width, height in shapes:
        source = pixels
        if resizes_vertically_first(image.size, (width, height)):
            source = _interpolate(source, height, image.width)
        resized.append(list(_interpolate(source, height, width)[0].numpy()))
    return resized


def _interpolate(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return torch.nn.functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True)


def _write_normalized(planes: list[np.ndarray], columns: int, settings: ImageSettings, out: np.ndarray) -> None:
    """Cut uint8 colour planes (height, width) into tiles and write them to `out` (tiles, 3, size, size), normalised.

    Plane by plane and in place, because a plane of one tile stays in the cache: it costs a seventh of the resize. The
    order of the float32 operations is the original's (divide by 255, subtract, divide); folding them would be faster
    but changes the last bit.
    """
    size = settings.image_size
    mean, std = np.float32(settings.image_mean), np.float32(settings.image_std)
    for channel, plane in enumerate(planes):
        blocks = plane.reshape(-1, size, columns, size)
        for index in range(len(out)):
            target = out[index, channel]
            target[...] = blocks[index // columns, :, index % columns]
            target /= np.float32(255)
            target -= mean[channel]
            target /= std[channel]


def _as_batch(
    pixels: np.ndarray, counts: list[int], return_tensors: str | None, device: str | torch.device | None
) -> BatchFeature:
    kind = getattr(return_tensors, "value", return_tensors)
    if kind == "pt":
        data = {"pixel_values": torch.from_numpy(pixels), "num_patches": torch.tensor(counts, dtype=torch.int64)}
        return BatchFeature({name: value.to(device) for name, value in data.items()} if device else data)
    if kind == "np":
        return BatchFeature({"pixel_values": pixels, "num_patches": np.array(counts, dtype=np.int64)})
    if kind is None:
        return BatchFeature({"pixel_values": pixels, "num_patches": counts})
    raise ValueError(f'return_tensors must be "pt", "np" or None, got {return_tensors!r}')


InternVLImageProcessor.register_for_auto_class("AutoImageProcessor")
