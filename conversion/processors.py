"""What a folder's saved processor says, kept through conversion.

`config.json` decides what it knows: tile size, tiling, template, system text. A saved processor that says otherwise is
overruled, and the change can be listed. Everything else (normalisation, `exact`, limits and budgets) only the saved
processor knows, so it is kept. Chat templates are not looked at here, nor the CLIP files of released repositories,
which no class of this package reads.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint_internvl import CheckpointError, read_json
from ..configuration_internvl_chat import InternVLChatConfig
from ..image_processing_internvl import ImageSettings, InternVLImageProcessor
from ..processing_internvl import InternVLProcessor, image_settings
from .source import told

FILE, _OLD_FILE = "processor_config.json", "preprocessor_config.json"
_DEFAULTS = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(ImageSettings()).items()}
# The only field of `InternVLProcessor` that the configuration does not decide.
OUTPUTS = "return_num_patches"
# Of the fields that the configuration does not decide, those that transformers' own processor does not have.
NOT_NATIVE = ("no_upscale", "max_total_patches", "divide_patches_by_images", "max_pixels", "exact", OUTPUTS)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


@dataclass(frozen=True)
class SavedProcessor:
    """The processor that loading a folder reads from its files.

    Attributes:
        image: Its image processor; None where there is none and everything follows from `config.json`.
        values: Fields of the processor itself.
        error: Why the files cannot be used, "" if they can.
    """

    image: InternVLImageProcessor | None = None
    values: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    @classmethod
    def open(cls, folder: Path) -> SavedProcessor:
        """Reads a folder; never raises for what it finds there (see `error`)."""
        if not (folder / FILE).is_file():
            return cls()
        try:
            values = read_json(folder / FILE)
            if "template" not in values and "image_seq_length" not in values:  # of no class that reads image settings
                return cls()
            if "image_processor" not in values and not (folder / _OLD_FILE).is_file():
                raise CheckpointError(f"it has no image_processor, and there is no {_OLD_FILE}")
            saved = cls(InternVLImageProcessor.from_pretrained(folder), values)
            saved._check_kinds(values.get("image_processor") or read_json(folder / _OLD_FILE))
            return saved
        except Exception as error:  # files from anywhere can make the loader raise anything
            return cls(error=told(error))

    def _check_kinds(self, written: dict[str, Any]) -> None:
        """Raises `CheckpointError` for a value that the image processor takes but nobody can mean."""
        flags = {name: value for name, value in self.settings().items() if isinstance(_DEFAULTS[name], bool)}
        flags[OUTPUTS] = self.values.get(OUTPUTS, True)
        for name, value in flags.items():
            if not isinstance(value, bool):
                raise CheckpointError(f"{name} is {value!r}, not true or false")
        for name in ("max_total_patches", "max_pixels"):
            value = getattr(self.image, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise CheckpointError(f"{name} is {value!r}, not an integer or null")
        for name in ("image_mean", "image_std"):
            values = getattr(self.image, name) if written.get(name) is None else written[name]
            if not isinstance(values, list) or not all(map(_is_share, values)):
                raise CheckpointError(f"{name} is {values!r}, not three numbers from 0 to 1")

    def settings(self) -> dict[str, Any]:
        """Every field of the image processor; the defaults where none is saved."""
        return {name: getattr(self.image, name, default) for name, default in _DEFAULTS.items()}

    def own(self, config: InternVLChatConfig) -> dict[str, Any]:
        """Fields of the image processor that the configuration does not decide."""
        decided = image_settings(config)
        return {name: value for name, value in self.settings().items() if name not in decided}

    def unusual(self, config: InternVLChatConfig) -> dict[str, Any]:
        """Those of `own` that are not as in every release."""
        found = {name: value for name, value in self.own(config).items() if value != _DEFAULTS[name]}
        if found.get("image_mean") or found.get("image_std"):
            found.pop("normalize_type", None)  # says less
        if not self.values.get(OUTPUTS, True):
            found[OUTPUTS] = False
        return found

    def overruled(self, config: InternVLChatConfig) -> dict[str, tuple[Any, Any]]:
        """Field -> (saved, of the configuration) where the two differ."""
        if self.image is None:
            return {}
        saved = {**self.values, **self.settings()}
        tokens = config.tokens_per_tile(1)[0]
        wanted = {**image_settings(config), "num_image_token": tokens, "image_seq_length": tokens}
        wanted |= {"template": config.template, "system_message": config.system_message}
        return {name: (saved[name], value) for name, value in wanted.items() if saved.get(name, value) != value}

    def changes(self, config: InternVLChatConfig) -> tuple[str, ...]:
        """One sentence for each setting that a conversion changes."""
        if self.error:
            return (f"{FILE} cannot be used ({self.error}) and is written anew from config.json",)
        return tuple(
            f"{name} {saved!r} becomes {wanted!r}, as config.json says"
            for name, (saved, wanted) in self.overruled(config).items()
        )

    def processor(self, config: InternVLChatConfig, tokenizer: Any) -> InternVLProcessor:
        """The processor of a converted checkpoint: as the configuration says, and beyond it as this one does."""
        made = InternVLProcessor.from_model_config(config, tokenizer, **self.own(config))
        made.return_num_patches = self.values.get(OUTPUTS, True)
        return made
