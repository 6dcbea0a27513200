"""A checkpoint opened for conversion: its configuration, and its tensors under original names without reading them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from ..checkpoint_internvl import CheckpointError, LazyTensor, Weights, read_json, scan_weights
from ..configuration_internvl_chat import InternVLChatConfig
from ..conversation import get_template
from ..generation_internvl import stop_ids
from ..native_internvl import foreign_tensors, is_native
from ..prompting_internvl import IMG_CONTEXT_TOKEN, IMG_END_TOKEN, IMG_START_TOKEN, prompt_encoder
from ..tokenization_internlm2 import InternLM2Tokenizer
from .checks_settings import impossible, impossible_ids
from .expected import compare, not_numbers
from .folders import resolve

IMAGE_TOKENS = (IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN)
# The embedding table on disk, of transformers' own language models and of InternLM2.
EMBEDDINGS = ("language_model.model.embed_tokens.weight", "language_model.model.tok_embeddings.weight")


@dataclass
class Source:
    """A checkpoint of any layout.

    Attributes:
        folder: Where it lies.
        config: Of the original layout, without adapters.
        weights: As on disk.
        tensors: Under original names, adapters merged.
        values: Its `config.json` as on disk.
    """

    folder: Path
    config: InternVLChatConfig
    weights: Weights
    tensors: dict[str, LazyTensor]
    values: dict[str, Any]

    @property
    def plain(self) -> bool:
        """Whether its weight files serve as they are: original names, no adapters, safetensors."""
        suffixes = {path.suffix for path in self.weights.paths}
        return self.tensors is self.weights.tensors and suffixes == {".safetensors"}


def one_line(error: Exception) -> str:
    """The first line of an error's text without its full stop, and the second if a colon announces it."""
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    return (f"{first} {rest[0].strip()}" if rest and first.endswith(":") else first).rstrip(".")


def told(error: Exception) -> str:
    """`one_line`, after the class of an error that was not written for users (a `KeyError` is a bare name)."""
    text, name = one_line(error), type(error).__name__
    return text if isinstance(error, ValueError | OSError | ImportError) or text == name else f"{name}: {text}"


@contextmanager
def readable(what: str, fix: str) -> Iterator[None]:
    """Makes one sentence of whatever a loader raises that is not meant for users.

    Raises:
        CheckpointError: `what` cannot be used, for such a reason; `fix` says what to do. `ValueError`, `OSError` and
            `ImportError` of one line pass, as they say it themselves.
    """
    try:
        yield
    except Exception as error:  # files from anywhere can make the loaders raise anything
        meant = isinstance(error, ValueError | OSError | ImportError) and "\n" not in str(error).strip()
        if meant:
            raise
        raise CheckpointError(f"{what} cannot be used ({told(error)}): {fix}.") from error


def open_checkpoint(name_or_path: str | Path, **hub_options: Any) -> Source:
    """Opens a folder or a Hub repository and checks names, shapes and kinds of all its tensors.

    Raises:
        CheckpointError: files are missing or damaged, a field has a value with which no model can work, or the tensors
            are not those that the configuration asks for.
        ValueError: a kind of checkpoint that this package does not know.
    """
    folder = resolve(name_or_path, **hub_options)
    values = read_json(folder / "config.json")
    with readable(f"{folder / 'config.json'}", "correct it"):
        config = InternVLChatConfig.from_pretrained(folder)
        for _, sentence in impossible(config, is_native(values)):
            raise CheckpointError(f"{folder / 'config.json'}: {sentence}: correct it.")
    config.use_backbone_lora = config.use_llm_lora = 0
    config._name_or_path = ""
    weights = scan_weights(folder).checked()
    with readable(f"{folder / 'config.json'}", "correct it, or take it from the revision of the weights"):
        tensors = foreign_tensors(weights.tensors, config)
        tensors = weights.tensors if tensors is None else tensors
        report = compare(tensors, config)
    if not report.sound:
        raise CheckpointError(f"{folder}: weights and config.json do not belong together: {report.summary()}.")
    if wrong := not_numbers(tensors, values):
        raise CheckpointError(f"{folder}: {wrong}: fetch the checkpoint again.")
    if report.dead:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in report.dead}
    return Source(folder, config, weights, tensors, values)


def embedding_rows(tensors: Mapping[str, LazyTensor]) -> int | None:
    """Rows of the embedding table among tensors under original names; None where there is none."""
    return next((tensors[name].shape[0] for name in EMBEDDINGS if name in tensors), None)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder that `make_loadable` wrote, without running code from the folder."""
    values = read_json(folder / "tokenizer_config.json")
    if values.get("tokenizer_class") == InternLM2Tokenizer.__name__:
        return InternLM2Tokenizer.from_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def settle_context_token(source: Source, tokenizer: Any) -> None:
    """Writes the id of `<IMG_CONTEXT>` into the source's configuration, after checking the ids that prompts need.

    Raises:
        CheckpointError: the tokenizer lacks an image token, or has ids beyond the table.
    """
    ids = {token: prompt_encoder(tokenizer).token_id(token) for token in IMAGE_TOKENS}
    if missing := [token for token, number in ids.items() if number is None]:
        raise CheckpointError(f"the tokenizer has no {missing[0]} token: take the tokenizer of the InternVL release.")
    ids |= {tokenizer.eos_token: tokenizer.eos_token_id, tokenizer.pad_token: tokenizer.pad_token_id}
    rows = embedding_rows(source.tensors)
    for token, number in ids.items():
        if rows is not None and number is not None and number >= rows:
            raise CheckpointError(
                f"token {token} has id {number}, but the embedding table has {rows} rows: tokenizer and weights do "
                "not belong together."
            )
    source.config.img_context_token_id = ids[IMG_CONTEXT_TOKEN]


def generation_config(folder: Path, config: InternVLChatConfig, tokenizer: Any) -> GenerationConfig:
    """The released generation settings with every stop token of the template and the tokenizer, and a pad token."""
    path = folder / "generation_config.json"
    end = prompt_encoder(tokenizer).token_id(get_template(config.template).end_of_turn)
    with readable(str(path), "correct it, or remove it"):
        values = read_json(path) if path.is_file() else {}
        for _, sentence in impossible_ids(values, getattr(config.llm_config, "vocab_size", None)):
            raise CheckpointError(f"{path}: {sentence}: correct it, or remove it.")
        released = GenerationConfig.from_dict(values)
        released.eos_token_id = stop_ids(end, tokenizer.eos_token_id, released.eos_token_id) or None
    if released.pad_token_id is None:
        released.pad_token_id = tokenizer.pad_token_id
    return released
