"""Every released InternVL checkpoint: finding one by name, building its configuration, recognising a configuration.

The facts live in `families.yaml`; this file only reads them. It loads no weights and asks no network: a release is
recognised by its shapes and settings alone, never by a name inside the file, because released files carry wrong ones.
"""

from __future__ import annotations

import copy
import difflib
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PretrainedConfig

from ..configuration_intern_vit import InternVisionConfig
from ..configuration_internvl_chat import InternVLChatConfig
from ..modeling_intern_vit import InternVisionModel
from ..modeling_internvl_chat import InternVLChatModel
from ..native_internvl import config_from_native, is_native
from .source import readable

_TABLE = Path(__file__).with_name("families.yaml")
_HUB = "OpenGVLab"
# Fields of the vision configuration that give its weights their shapes or decide how they are used.
_VISION_SHAPE = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size", "norm_type",
    "qkv_bias", "qk_normalization",
)  # fmt: skip
_LLM_SHAPE = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
    "num_experts_per_tok", "moe_intermediate_size",
)  # fmt: skip
_CHAT_DETAILS = (
    "template", "select_layer", "ps_version", "dynamic_image_size", "use_thumbnail", "max_dynamic_patch",
)  # fmt: skip
_LLM_DETAILS = ("vocab_size", "tie_word_embeddings", "max_position_embeddings", "rms_norm_eps")


class UnknownReleaseError(ValueError):
    """A name or a kind of configuration that no InternVL release has."""


@dataclass(frozen=True, eq=False)
class Release:
    """One released checkpoint, or several of one shape (stages, layouts, domain fine-tunes).

    Attributes:
        name: Its name on the Hub, without the organisation.
        generation: `"1.1"` to `"3.5"`, `"2.5-MPO"`, or `"encoder"` for an InternViT.
        date: Day of release, ISO format.
        variants: Suffixes of further repositories (`"Instruct"` for `InternVL3-8B-Instruct`).
        also: Further repositories of other names.
        aliases: Other spellings of the name.
        encoder, vision: Name and fields of the vision encoder.
        llm, language_model: Name of the base language model (None for encoders) and fields of its configuration.
        tokens: Ids of the special tokens; None where unknown.
        settings: Fields of `InternVLChatConfig` that are neither of the encoder's nor of the language model's.
        context: Longest training sequence in tokens, or None.
        published: Parameter counts as published, such as `"25.51B"`: `total`, and where known the parts.
        source: Where they were published.
        uncertain: Facts that no published file confirmed.
        notes: Remarks, one sentence each.
    """

    name: str
    generation: str
    date: str
    encoder: str
    vision: Mapping[str, Any]
    llm: str | None
    language_model: Mapping[str, Any]
    tokens: Mapping[str, Any]
    settings: Mapping[str, Any]
    context: int | None
    published: Mapping[str, str]
    source: str
    variants: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    uncertain: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_encoder(self) -> bool:
        """Whether this is an InternViT alone."""
        return self.llm is None

    @property
    def hub_ids(self) -> tuple[str, ...]:
        """Its repositories; the first is the release itself."""
        names = (self.name, *(f"{self.name}-{variant}" for variant in self.variants), *self.also)
        return tuple(f"{_HUB}/{name}" for name in names)

    def config(self) -> InternVLChatConfig | InternVisionConfig:
        """A fresh configuration, ready to build the model (an encoder's own for an encoder)."""
        vision = copy.deepcopy(dict(self.vision))
        if self.is_encoder:
            return InternVisionConfig(architectures=["InternVisionModel"], **vision)
        return InternVLChatConfig(
            architectures=["InternVLChatModel"],
            vision_config=vision,
            llm_config=copy.deepcopy(dict(self.language_model)),
            img_context_token_id=self.tokens["img_context"],
            **self.settings,
        )


# --------------------------------------------------------------------------------------------------------------- table


@cache
def releases() -> tuple[Release, ...]:
    """All releases, in the order of their publication."""
    table = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))
    return tuple(sorted((_release(entry, table) for entry in table["releases"]), key=lambda release: release.date))


def _release(entry: dict[str, Any], table: dict[str, Any]) -> Release:
    """One record of the table, with what it shares with others filled in."""
    generation = table["generations"][entry["generation"]]
    merged = {key: entry.get(key, generation.get(key)) for key in ("date", "context", "variants")}
    lists = {key: tuple(merged.get(key) or entry.get(key) or ()) for key in ("variants", "also", "aliases")}
    for key in ("uncertain", "notes"):
        lists[key] = (*entry.get(key, ()), *generation.get(key, ()))
    fields, tokens = _language_model(entry.get("llm"), table)
    return Release(
        name=entry["name"],
        generation=entry["generation"],
        date=str(merged["date"]),
        encoder=entry["encoder"],
        vision=table["encoders"][entry["encoder"]],
        llm=entry.get("llm"),
        language_model=fields,
        tokens=tokens,
        settings={**generation["settings"], **entry.get("settings", {})},
        context=merged["context"],
        published=entry["published"],
        source=table["sources"][entry["source"]],
        **lists,
    )


def _language_model(name: str | None, table: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of an `llm_config` and the ids of the special tokens."""
    if name is None:
        return {}, {}
    fields = dict(table["language_models"][name])
    tokens = dict(table["vocabularies"][fields.pop("vocabulary")])
    fields["architectures"] = [fields.pop("architecture")]
    return {**fields, "vocab_size": tokens.pop("rows"), "tie_word_embeddings": False}, tokens


# --------------------------------------------------------------------------------------------------------------- names


def _normalise(name: str) -> str:
    """Last part of a Hub id or path, in lower case, `.` and `_` as `-` (the papers write InternVL2.5)."""
    return name.strip().rstrip("/").rsplit("/", 1)[-1].lower().replace(".", "-").replace("_", "-")


@cache
def _index() -> dict[str, Release]:
    index: dict[str, Release] = {}
    for release in releases():
        for name in (*release.hub_ids, *release.aliases):
            index[_normalise(name)] = release
    return index


def find(name: str) -> Release:
    """The release of that name.

    Args:
        name: With or without organisation, in any case, with or without the suffix of a stage or layout
            (`"OpenGVLab/InternVL3-8B"`, `"internvl3-8b-instruct"`, `"InternVL3-8B-hf"`, `"InternVL2.5-4B"`).

    Raises:
        UnknownReleaseError: no release is called so; the message lists the closest names.
    """
    release = _index().get(_normalise(name))
    if release is not None:
        return release
    known = {_normalise(hub_id): hub_id.rsplit("/", 1)[-1] for release in releases() for hub_id in release.hub_ids}
    closest = [known[match] for match in difflib.get_close_matches(_normalise(name), known, n=3, cutoff=0.5)]
    hint = f"Closest: {', '.join(closest)}." if closest else "The command `internvl describe` lists all."
    raise UnknownReleaseError(f"No InternVL release is called {name!r}. {hint}")


# --------------------------------------------------------------------------------------------------------- recognition


def identify(config: PretrainedConfig | Mapping[str, Any]) -> tuple[Release, ...]:
    """The releases of the same architecture, the one with the fewest differing settings first.

    The architecture is the shape of the network; vocabulary rows are a setting here, since fine-tunes add some.
    Several releases can be equal in everything (InternVL2_5-1B and its -MPO); the earlier then stands first.

    Args:
        config: An `InternVLChatConfig` or `InternVisionConfig`, or a `config.json` dictionary or configuration object
            of the original layout or of transformers' own InternVL.

    Raises:
        UnknownReleaseError: another kind of model.
        ValueError: the configuration cannot be read.
    """
    own = _own_config(config)
    shape = _shape(own)
    same = [release for release in releases() if _shapes()[release] == shape]
    return tuple(sorted(same, key=lambda release: len(differences(own, release))))


def differences(config: PretrainedConfig | Mapping[str, Any], release: Release) -> dict[str, tuple[Any, Any]]:
    """Settings in which a configuration and a release differ: name -> (of the configuration, of the release).

    Facts that the table calls uncertain are not compared.
    """
    theirs = _details(release.config())
    found = {name: (value, theirs.get(name)) for name, value in _details(_own_config(config)).items()}
    return {name: pair for name, pair in found.items() if pair[0] != pair[1] and name not in release.uncertain}


def _own_config(config: PretrainedConfig | Mapping[str, Any]) -> InternVLChatConfig | InternVisionConfig:
    if isinstance(config, InternVLChatConfig | InternVisionConfig):
        return config
    values = dict(config) if isinstance(config, Mapping) else config.to_dict()
    if is_native(values):
        values = config_from_native(values)
    for kind in (InternVLChatConfig, InternVisionConfig):
        if values.get("model_type") == kind.model_type:
            return kind.from_dict(values)
    raise UnknownReleaseError(
        f"A configuration of model_type {values.get('model_type')!r} is not InternVL's: expected 'internvl_chat', "
        "'internvl' (transformers' own) or 'intern_vit_6b'."
    )


@cache
def _shapes() -> dict[Release, dict[str, Any]]:
    return {release: _shape(release.config()) for release in releases()}


def _shape(config: InternVLChatConfig | InternVisionConfig) -> dict[str, Any]:
    """What two checkpoints must share to hold the same tensors (up to the vocabulary and the tile size)."""
    if isinstance(config, InternVisionConfig):
        return {name: getattr(config, name) for name in _VISION_SHAPE}
    vision, llm = config.vision_config, config.llm_config
    shape = {f"vision.{name}": getattr(vision, name) for name in _VISION_SHAPE}
    shape |= {f"llm.{name}": getattr(llm, name, None) for name in _LLM_SHAPE}
    # InternLM2 is a Llama whose weights are stored differently; transformers' own layout calls it one.
    shape["llm.type"] = "llama" if llm.model_type == "internlm2" else llm.model_type
    shape["llm.head_dim"] = getattr(llm, "head_dim", None) or llm.hidden_size // llm.num_attention_heads
    shape["llm.experts"] = getattr(llm, "num_experts", None) or getattr(llm, "num_local_experts", None)
    shape["downsample_ratio"] = config.downsample_ratio
    return shape


def _details(config: InternVLChatConfig | InternVisionConfig) -> dict[str, Any]:
    if isinstance(config, InternVisionConfig):
        return {"image_size": config.image_size}
    llm = config.llm_config
    rope = getattr(llm, "rope_parameters", None) or {}
    return {
        "image_size": config.image_size,
        **{name: getattr(config, name) for name in _CHAT_DETAILS},
        **{name: getattr(llm, name, None) for name in _LLM_DETAILS},
        "rope": (rope.get("rope_theta"), rope.get("rope_type", "default"), rope.get("factor")),
    }


def parameter_count(config: InternVLChatConfig | InternVisionConfig) -> dict[str, int]:
    """Parameters of a model: `vision`, `projector`, `language_model` and `total`.

    The model is built on the meta device, which holds shapes and no numbers; a tied head counts once.
    """
    config = copy.deepcopy(config)  # building one writes into its configuration
    with torch.device("meta"):
        if isinstance(config, InternVisionConfig):
            parts: dict[str, Any] = {"vision": InternVisionModel(config), "projector": None, "language_model": None}
        else:
            model = InternVLChatModel(config)
            parts = {"vision": model.vision_model, "projector": model.mlp1, "language_model": model.language_model}
    counts = {name: 0 if part is None else sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    return {**counts, "total": sum(counts.values())}


# --------------------------------------------------------------------------------------------------------- description

_TOKENS = {
    "img": ["<img>"], "end_img": ["</img>"], "img_context": ["<IMG_CONTEXT>"], "quad": ["<quad>", "</quad>"],
    "ref": ["<ref>", "</ref>"], "box": ["<box>", "</box>"], "end_of_turn": ["end of turn"],
}  # fmt: skip
_COLUMNS = ("name", "date", "parameters", "vision encoder", "language model", "template", "context", "tiles")


def describe_all() -> str:
    """A plain-text table of all releases, with parameter totals as published."""
    rows = [_COLUMNS]
    for release in releases():
        tiles = release.settings.get("max_dynamic_patch", 1)
        cells = (release.name, release.date, release.published["total"], release.encoder, release.llm)
        rows.append((*cells, release.settings.get("template"), release.context, None if release.is_encoder else tiles))
    text = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in text)


def describe(what: Release | PretrainedConfig | Mapping[str, Any]) -> str:
    """Plain text about a release, or about a configuration and the releases that it equals.

    Args:
        what: A `Release`, or anything that `identify` takes.

    Raises:
        ValueError: as `identify`, or no model can be built of it.
    """
    if isinstance(what, Release):
        config = what.config()
        first = dict.fromkeys(("parts", "parameters", "published"))  # fixes the order of the rows
        return _render(f"{what.name} ({what.date})", {**first, **_config_rows(config), **_release_rows(what)})
    with readable("this configuration", "correct config.json"):
        return _describe_config(_own_config(what))


def _describe_config(config: InternVLChatConfig | InternVisionConfig) -> str:
    same = identify(config)
    if not same:
        return _render("No released architecture", _config_rows(config))
    closest = differences(config, same[0])
    rows = {
        "same shapes": ", ".join(release.name for release in same),
        f"unlike {same[0].name}": [f"{key}: {own} instead of {theirs}" for key, (own, theirs) in closest.items()],
    }
    return _render(f"Architecture of {same[0].name}", {**rows, **_config_rows(config)})


def _config_rows(config: InternVLChatConfig | InternVisionConfig) -> dict[str, Any]:
    counts = parameter_count(config)
    parts = [f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items() if count and name != "total"]
    rows = {"parameters": f"{counts['total']:,} ({', '.join(parts)})"}
    if isinstance(config, InternVisionConfig):
        return {**rows, "vision encoder": f"{_layers(config)}, {config.image_size} px"}
    llm, size, shape = config.llm_config, config.image_size, _shape(config)
    experts, width = shape["llm.experts"], shape["llm.moe_intermediate_size"] or shape["llm.intermediate_size"]
    mlp = f"{experts} experts of width {width}, {llm.num_experts_per_tok} per token" if experts else f"MLP {width}"
    tiling = f"one tile of {size} px"
    if config.dynamic_image_size:
        tiling = f"{config.min_dynamic_patch} to {config.max_dynamic_patch} tiles of {size} px"
        tiling += ", and a thumbnail" * config.use_thumbnail
    theta, rope, factor = _details(config)["rope"]
    scaling = "" if rope == "default" else f", {rope} scaling" + (f" by {factor:g}" if factor else "")
    return {
        **rows,
        "vision encoder": f"{_layers(config.vision_config)}; features of hidden state {config.select_layer}",
        "tokens per tile": f"{config.tokens_per_tile(1)[0]} (pixel shuffle {config.ps_version})",
        "tiling": tiling,
        "language model": f"{llm.architectures[0]}: {_layers(llm)} of {shape['llm.head_dim']}, "
        f"{shape['llm.num_key_value_heads'] or llm.num_attention_heads} key/value heads, {mlp}",
        "vocabulary": f"{llm.vocab_size:,} rows, output head {'tied' if llm.tie_word_embeddings else 'separate'}",
        "positions": f"{llm.max_position_embeddings:,}" + (f", rotary theta {theta:,.0f}{scaling}" if theta else ""),
        "template": config.template,
    }


def _layers(config: PretrainedConfig) -> str:
    return f"{config.num_hidden_layers} layers, width {config.hidden_size}, {config.num_attention_heads} heads"


def _release_rows(release: Release) -> dict[str, Any]:
    published = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in release.published.items())
    known, unknown = [], []
    for name, ids in release.tokens.items():
        for token, number in zip(_TOKENS[name], ids if isinstance(ids, list) else [ids], strict=False):
            (unknown if number is None else known).append(f"{token} {number or ''}".rstrip())
    return {
        "parts": " + ".join(part for part in (release.encoder, release.llm) if part),
        "published": f"{published}; {release.source}",
        "context": f"trained with up to {release.context:,} tokens" if release.context else "",
        "special ids": [", ".join(known), f"not known: {', '.join(unknown)}" if unknown else ""],
        "on the Hub": ", ".join(release.hub_ids),
        "uncertain": ", ".join(release.uncertain),
        "notes": list(release.notes),
    }


def _render(title: str, rows: Mapping[str, Any]) -> str:
    """Title and aligned rows; a list takes one line per item, an empty value none."""
    width = max(len(label) for label in rows) + 4
    lines = [title]
    for label, value in rows.items():
        items = value if isinstance(value, list) else [value]
        for item in filter(None, items):
            indents = {"initial_indent": f"  {label}".ljust(width), "subsequent_indent": " " * width}
            lines += textwrap.wrap(str(item), 110, break_long_words=False, break_on_hyphens=False, **indents)
            label = ""
    return "\n".join(lines)
