"""The tokenizer that a run trains with, the tokens that InternVL adds to it, and the rows of their embeddings.

How tokenizers of releases are made loadable is `conversion.tokenizers`; nothing here is written to a checkpoint.
"""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..checkpoint_internvl import read_json
from ..conversion.folders import resolve
from ..conversion.source import load_tokenizer
from ..conversion.tokenizers import make_loadable
from ..prompting_internvl import IMG_CONTEXT_TOKEN, IMG_END_TOKEN, IMG_START_TOKEN

# In the order in which the original adds them (`internvl/train/constants.py`, `internvl_chat_finetune.py`).
SPECIAL_TOKENS = (
    IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN, "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>",
)  # fmt: skip


def load_own_tokenizer(name_or_path: str | Path) -> Any:
    """The tokenizer of a folder or repository: released SentencePiece ones, other models' and this package's own."""
    folder = resolve(name_or_path, weights=False)
    config = folder / "config.json"
    made = tempfile.TemporaryDirectory(prefix="internvl_tokenizer_")
    make_loadable(folder, made.name, read_json(config) if config.is_file() else {})
    tokenizer = load_tokenizer(Path(made.name))
    weakref.finalize(tokenizer, made.cleanup)  # SentencePiece ones copy their file from here when saved
    return tokenizer


def rows_needed(tokenizer: Any) -> int:
    """Rows of an embedding table that has one for every id; ids may have gaps."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


@torch.no_grad()
def add_special_tokens(language_model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Adds the tokens of `SPECIAL_TOKENS` that are missing; old rows of the embeddings keep their bits.

    Their output rows are the mean of the rows of all older tokens, as in the original, so that at first each gets an
    average logit. The original leaves their input rows to the library's random start; here they are the mean of the
    older input rows. It lies where the language model expects embeddings, also under a frozen one, whose new rows
    never move; it depends on no random state, so every rank has the same; and rows that padded the vocabulary, which
    nobody trained, are not taken over. The original also cuts such padding off; here tables only ever grow.

    Args:
        language_model: Grows where the ids leave its table.
        tokenizer: Changed in place.

    Returns:
        Rows that were written: ids of new tokens, and ids beyond the old table.
    """
    before = set(tokenizer.get_vocab().values())
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    table: Any = language_model.get_input_embeddings()
    rows, needed = table.weight.shape[0], rows_needed(tokenizer)
    new = sorted((set(tokenizer.get_vocab().values()) - before) | set(range(rows, needed)))
    if needed > rows:
        language_model.resize_token_embeddings(needed, mean_resizing=False)
    if new:
        _write_means(language_model.get_input_embeddings(), new)
        _write_means(language_model.get_output_embeddings(), new)
    return new


def _write_means(table: Any, rows: list[int]) -> None:
    for values in (table.weight, getattr(table, "bias", None)):
        if values is not None:
            values[rows] = values[: rows[0]].mean(dim=0)
