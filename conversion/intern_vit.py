"""InternViT checkpoints as files: take the encoder out of a chat model, drop layers, resize positions, older names.

Each function reads a folder or Hub repository and writes a new folder, with the code that loads it; the source stays
as it is, and the target appears whole or not at all. Tensors keep their values and dtypes; only `resize_positions`
computes one. Whole chat checkpoints are read here but never written.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from ..checkpoint_internvl import CheckpointError, LazyTensor, derive, read_json, scan_weights
from ..configuration_intern_vit import InternVisionConfig
from ..image_processing_internvl import NORMALIZATIONS
from ..modeling_intern_vit import InternVisionModel, resize_position_table
from ..upload_to_hub import write_json
from ..weights_internvl import LayoutError
from .folders import resolve, staged_folder, write_tensors

logger = logging.get_logger(__name__)

PathLike = str | os.PathLike[str]
Value = TypeVar("Value")

_PREFIX = "vision_model."  # of the encoder in chat checkpoints
_POSITIONS = "embeddings.position_embedding"
# What released encoders say in preprocessor_config.json: short side to S, S x S from the centre.
_CENTRE_CROP = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 0},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 0, "width": 0},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}
_HEADS = {3200: 25, 1024: 16}  # attention heads of the released widths (the weights do not tell)

# ---------------------------------------------------------------------------------------------------------- operations


def keep_layers(model: InternVisionModel, layers: int) -> InternVisionModel:
    """Drops the last layers of an encoder in memory, so that the first `layers` stay; returns `model`.

    With n layers dropped, `last_hidden_state` is what `hidden_states[-(n + 1)]` was. Of 48 layers chat models do best
    with hidden state -4 (model card of InternViT-6B-448px-V1-2), so releases since then have 45.

    Raises:
        ValueError: it does not have more than `layers` layers.
    """
    _check_layers(model.config, layers)
    del model.encoder.layers[layers:]
    model.config.num_hidden_layers = layers
    return model


def cut_layers(source: PathLike, target: PathLike, layers: int) -> Path:
    """As `keep_layers`, for a folder: writes the first `layers` layers of the encoder in `source` to `target`.

    Raises:
        CheckpointError: `source` cannot be read. LayoutError: it is no encoder checkpoint. ValueError: it does not
            have more than `layers` layers. FileExistsError: `target` is not empty.
    """
    source = resolve(source)
    config, tensors = _read_encoder(source)
    _check_layers(config, layers)
    config.num_hidden_layers = layers
    kept = {name: tensor for name, tensor in tensors.items() if _layer_of(name) < layers}
    return _write_encoder(target, config, kept, source)


def resize_positions(source: PathLike, target: PathLike, image_size: int) -> Path:
    """Writes the encoder of `source` with its position table resized for good to tiles of `image_size` pixels.

    The result computes what `source` computes on such tiles by interpolating in each forward, to the bit; it is the
    start for training at another size (224 -> 448 in InternVL-Chat-V1-1).

    Raises:
        CheckpointError: `source` cannot be read. LayoutError: it is no encoder checkpoint. ValueError: `image_size` is
            no positive multiple of the patch size. FileExistsError: `target` is not empty.
    """
    source = resolve(source)
    config, tensors = _read_encoder(source)
    patch = config.patch_size
    if image_size < patch or image_size % patch:
        below = max(image_size // patch, 1) * patch
        raise ValueError(
            f"image_size {image_size} is no multiple of the patch size {patch}: take {below} or {below + patch}."
        )
    _check_tensors(config, tensors, source)
    side = image_size // patch
    tensors[_POSITIONS] = derive([tensors[_POSITIONS]], lambda table: resize_position_table(table, side, side))
    config.image_size = image_size
    return _write_encoder(target, config, tensors, source)


def extract_encoder(chat: PathLike, target: PathLike) -> Path:
    """Writes the vision encoder of a chat checkpoint as a checkpoint of its own; only its tensors are read.

    Raises:
        CheckpointError: `chat` cannot be read. LayoutError: it has no InternViT in the original layout, or LoRA
            adapters are stored inside it. FileExistsError: `target` is not empty.
    """
    chat = resolve(chat)
    config, tensors = _read_encoder(chat, whole=True)
    layer = read_json(chat / "config.json").get("select_layer", -1)
    if layer != -1:
        logger.warning(
            f"{chat} reads hidden state {layer} of {config.num_hidden_layers} layers: take it from hidden_states too, "
            "or drop the layers after it (cut_layers)."
        )
    return _write_encoder(target, config, tensors, chat)


# ---------------------------------------------------------------------------------------------------- the older naming

# https://github.com/OpenGVLab/InternVL, classification/models/intern_vit_6b.py and classification/hf2pytorch.py.
_FROM_PYTORCH = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": _POSITIONS,
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
}
_TO_PYTORCH = {own: older for older, own in _FROM_PYTORCH.items()}
_SHARED = r"(?:norm[12]|attn\.(?:qkv|proj)|mlp\.fc[12])\.(?:weight|bias)|attn\.[qk]_norm\.weight"
_OLDER_LAYER = re.compile(rf"blocks\.(\d+)\.(?:({_SHARED})|(ls[12])\.gamma)")
_OWN_LAYER = re.compile(rf"encoder\.layers\.(\d+)\.({_SHARED}|ls[12])")
# Beside the encoder: attention pooling and text tower of InternVL-C, heads of linear probes.
_NOT_ENCODER = ("clip_projector.", "transformer.", "text_projection", "logit_scale", "norm.", "head.")


@dataclass(frozen=True)
class Renamed:
    """Every key of a file, accounted for.

    Attributes:
        weights: The encoder, under its new names.
        left_out: Old names of what is no part of the encoder.
    """

    weights: dict[str, Any]
    left_out: list[str]


def rename_from_pytorch(weights: Mapping[str, Value]) -> Renamed:
    """Weights of `intern_vit_6b_224px.pth` or `internvl_c_13b_224px.pth` under the names of `InternVisionModel`.

    The map is one-to-one and looks at names only (`cls_token`, `blocks.0.ls1.gamma`, ...).

    Raises:
        LayoutError: a name is neither one of the encoder's nor one of the parts that these files have beside it.
    """
    renamed: dict[str, Any] = {}
    left_out, unknown = [], []
    for name, value in weights.items():
        match = _OLDER_LAYER.fullmatch(name)
        if match:
            renamed[f"encoder.layers.{match[1]}.{match[2] or match[3]}"] = value
        elif name in _FROM_PYTORCH:
            renamed[_FROM_PYTORCH[name]] = value
        else:
            (left_out if name.startswith(_NOT_ENCODER) else unknown).append(name)
    if unknown:
        raise LayoutError(
            f"not names of the older InternViT layout: {_some(unknown)}; remove them, or rename by hand."
        )
    return Renamed(renamed, left_out)


def rename_to_pytorch(weights: Mapping[str, Value]) -> dict[str, Value]:
    """The inverse of `rename_from_pytorch`; `LayoutError` for a name that `InternVisionModel` does not have."""
    renamed = {}
    for name, value in weights.items():
        match = _OWN_LAYER.fullmatch(name)
        if match:
            gamma = ".gamma" if match[2].startswith("ls") else ""
            renamed[f"blocks.{match[1]}.{match[2]}{gamma}"] = value
        elif name in _TO_PYTORCH:
            renamed[_TO_PYTORCH[name]] = value
        else:
            raise LayoutError(f"{name} is no tensor of InternVisionModel: take the encoder out (extract_encoder).")
    return renamed


def from_pytorch(file: PathLike, target: PathLike, num_attention_heads: int | None = None) -> list[str]:
    """Writes the encoder of a `.pth` file with the older names (bare, or under `module`) as a checkpoint folder.

    Args:
        file: Is mapped, not read at once; code in it is refused.
        target: New folder.
        num_attention_heads: Needed for widths other than 3200 and 1024, because the weights do not tell.

    Returns:
        The names in `file` that are no part of the encoder and were left out.

    Raises:
        CheckpointError: `file` cannot be read. LayoutError: its tensors are not those of an InternViT. ValueError: the
            number of heads is not known or impossible. FileExistsError: `target` is not empty.
    """
    renamed = rename_from_pytorch(_load_pickled(Path(file)))
    tensors = {name: LazyTensor.of(value, name) for name, value in renamed.weights.items()}
    config = _config_of(tensors, num_attention_heads, Path(file))
    _write_encoder(target, config, tensors, Path(file))
    return renamed.left_out


def to_pytorch(source: PathLike, file: PathLike) -> Path:
    """Writes the encoder in `source` as one `.pth` file with the older names, under `module`.

    Raises:
        CheckpointError: `source` cannot be read. LayoutError: it is no encoder checkpoint. FileExistsError: `file`
            exists.
    """
    source, file = resolve(source), Path(file).resolve()
    config, tensors = _read_encoder(source)
    _check_tensors(config, tensors, source)
    if file.exists():
        raise FileExistsError(f"{file} exists: choose a new file.")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as temporary:
        state = rename_to_pytorch({name: tensor.read() for name, tensor in tensors.items()})
        torch.save({"module": state}, Path(temporary) / file.name)
        (Path(temporary) / file.name).rename(file)
    return file


def _load_pickled(file: Path) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise CheckpointError(f"there is no file {file}.")
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # noqa: BLE001 (pickle, zip and torch each raise their own)
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{file} is not a file of tensors alone that torch.save wrote since version 1.6 ({line}): fetch it again, "
            "or save its state dict anew."
        ) from None
    state = state.get("module", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not state or not all(map(_is_named_tensor, state.items())):
        raise LayoutError(f"{file} holds no state dict, neither bare nor under 'module': save its state dict anew.")
    return state


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], torch.Tensor)


def _config_of(tensors: Mapping[str, LazyTensor], heads: int | None, file: Path) -> InternVisionConfig:
    """The configuration that the shapes tell; the norms' epsilon is the released 1e-6."""
    layer = "encoder.layers.0."
    needed = ["embeddings.class_embedding", "embeddings.patch_embedding.weight", _POSITIONS, f"{layer}mlp.fc1.weight"]
    if missing := [name for name in needed if name not in tensors]:
        raise LayoutError(
            f"{file} holds no whole InternViT: it lacks {_some(rename_to_pytorch(dict.fromkeys(missing)))}."
        )
    indices = {_layer_of(name) for name in tensors} - {-1}
    if len(tensors[needed[1]].shape) != 4 or len(tensors[_POSITIONS].shape) != 3 or max(indices) >= len(indices):
        raise LayoutError(f"{file} holds no InternViT: its patch_embed, pos_embed or numbering of blocks is another.")
    width, channels, patch, _ = tensors[needed[1]].shape
    heads = heads or _HEADS.get(width)
    if heads is None:
        raise ValueError(f"no released InternViT has width {width}: pass num_attention_heads.")
    return InternVisionConfig(
        hidden_size=width,
        num_attention_heads=heads,
        num_channels=channels,
        patch_size=patch,
        image_size=round((tensors[_POSITIONS].shape[1] - 1) ** 0.5) * patch,
        intermediate_size=tensors[needed[3]].shape[0],
        num_hidden_layers=len(indices),
        qkv_bias=f"{layer}attn.qkv.bias" in tensors,
        qk_normalization=f"{layer}attn.q_norm.weight" in tensors,
        norm_type="layer_norm" if f"{layer}norm1.bias" in tensors else "rms_norm",
    )


# ------------------------------------------------------------------------------------------------- reading and writing


def _read_encoder(folder: Path, whole: bool = False) -> tuple[InternVisionConfig, dict[str, LazyTensor]]:
    """Configuration and unread tensors of an encoder checkpoint, or (`whole`) of the encoder in a chat checkpoint."""
    values = read_json(folder / "config.json")
    nested = values.get("vision_config")
    if whole and nested is None:
        raise LayoutError(f"{folder} is no chat checkpoint: its config.json has no vision_config.")
    if not whole and nested is not None:
        raise LayoutError(f"{folder} is a whole chat checkpoint: take its encoder out first (extract_encoder).")
    found = (nested or values).get("model_type", InternVisionConfig.model_type)
    if found != InternVisionConfig.model_type:
        raise LayoutError(
            f"{folder} has a {found!r} encoder, not {InternVisionConfig.model_type!r}: only the original layout is "
            "read here, so convert the checkpoint to it first."
        )
    if values.get("use_backbone_lora"):
        raise LayoutError(f"{folder} stores LoRA adapters inside its encoder: merge them first.")
    tensors = scan_weights(folder).checked().tensors
    if whole:
        tensors = {name.removeprefix(_PREFIX): x for name, x in tensors.items() if name.startswith(_PREFIX)}
    return InternVisionConfig.from_pretrained(folder), dict(tensors)


def _write_encoder(
    target: PathLike, config: InternVisionConfig, tensors: Mapping[str, LazyTensor], source: Path
) -> Path:
    """A folder with weights, configuration, code, `preprocessor_config.json` and the licence, if `source` has one."""
    with staged_folder(target) as folder:
        model = _check_tensors(config, tensors, source)
        config.architectures = [type(model).__name__]
        config.dtype = tensors["embeddings.class_embedding"].dtype
        custom_object_save(model, folder, config=config)
        config.save_pretrained(folder)
        write_tensors(tensors, folder)
        _write_preprocessor(source, folder, config.image_size)
        if (source / "LICENSE").is_file():
            shutil.copyfile(source / "LICENSE", folder / "LICENSE")
    return Path(target)


def _check_tensors(config: InternVisionConfig, tensors: Mapping[str, LazyTensor], source: Path) -> InternVisionModel:
    """The model of `config` on the meta device, if `tensors` are all that it needs and nothing else."""
    with torch.device("meta"):
        model = InternVisionModel(config)
    wanted = model.state_dict()
    shapes = [name for name in wanted if name in tensors and tensors[name].shape != tuple(wanted[name].shape)]
    for names, what in (
        ([name for name in wanted if name not in tensors], "lacks"),
        ([name for name in tensors if name not in wanted], "has, beside an InternViT of its configuration,"),
        (shapes, "has other shapes than its configuration says for"),
    ):
        if names:
            raise LayoutError(f"{source} {what} {_some(names)}.")
    return model


def _write_preprocessor(source: Path, folder: Path, image_size: int) -> None:
    """`preprocessor_config.json` as `source` has it, with this size; else as released encoders do, with its means."""
    saved: dict[str, Any] = {}
    if (source / "preprocessor_config.json").is_file():
        saved = read_json(source / "preprocessor_config.json")
    elif (source / "processor_config.json").is_file():
        saved = read_json(source / "processor_config.json").get("image_processor") or {}
    if "crop_size" not in saved:  # a tiling processor's, or none
        mean, std = NORMALIZATIONS["imagenet"]
        means = {"image_mean": saved.get("image_mean", mean), "image_std": saved.get("image_std", std)}
        saved = {**_CENTRE_CROP, **means}
    sizes = {name: _with_edge(saved.get(name, image_size), image_size) for name in ("size", "crop_size")}
    write_json(folder / "preprocessor_config.json", saved | sizes)


def _with_edge(size: Any, edge: int) -> Any:
    return dict.fromkeys(size, edge) if isinstance(size, dict) else edge


def _check_layers(config: InternVisionConfig, layers: int) -> None:
    if not 0 < layers < config.num_hidden_layers:
        raise ValueError(f"cannot keep {layers} of {config.num_hidden_layers} layers: give fewer, but at least 1.")


def _layer_of(name: str) -> int:
    """Index of the layer that a tensor belongs to; -1 for the embeddings."""
    match = _OWN_LAYER.fullmatch(name)
    return int(match[1]) if match else -1


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
