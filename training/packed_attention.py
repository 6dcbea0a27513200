"""Attention over packs without a mask: scaled dot products row by row, where the lengths of the rows are known.

A mask of a pack has (tokens)^2 entries, nearly all of them zeros, and makes torch compute them. Here every row of a
pack gets causal attention of its own, as variable-length flash attention does where it is installed. Only models on
`sdpa` are switched; all else that they run (padded batches, generation) is as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "sdpa_by_row"


def attend_by_row(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    row_lengths: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' `sdpa` for each row of a pack; without `row_lengths`, for the whole.

    Args:
        module: The attention layer.
        query: (1, heads, L, D).
        key, value: (1, key heads, L, D).
        attention_mask: Not looked at with `row_lengths`.
        row_lengths: Tokens of each row, L in all.
        sliding_window: Positions that a token sees, its own included; None for all.
        **kwargs: As for `sdpa`.

    Returns:
        (1, L, heads, D), None.
    """
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if row_lengths is None:
        return sdpa(module, query, key, value, attention_mask, sliding_window=sliding_window, **kwargs)
    parts = []
    for q, k, v in zip(*(states.split(row_lengths, dim=2) for states in (query, key, value)), strict=True):
        mask = _window(q.shape[2], sliding_window, q.device)
        parts.append(sdpa(module, q, k, v, mask, **{**kwargs, "is_causal": mask is None})[0])
    return torch.cat(parts, dim=1), None


def _window(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """(1, 1, L, L) of what a token sees; None where that is everything before it."""
    if window is None or length <= window:
        return None
    places = torch.arange(length, device=device)
    distance = places[:, None] - places
    return ((distance >= 0) & (distance < window))[None, None]


AttentionInterface.register(NAME, attend_by_row)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def _pass_lengths(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Hands the lengths of a pack's rows to the layers as numbers, read from the device once, and a mask for none."""
    ends = kwargs.get("cu_seq_lens_q")
    if ends is not None and kwargs.get("attention_mask") is None:
        kwargs["row_lengths"] = tuple(ends.diff().tolist())
        nothing = torch.zeros(1, 1, 1, 1, device=ends.device)  # four dimensions: taken as a mask that is ready
        layers = getattr(decoder.config, "layer_types", None)
        kwargs["attention_mask"] = dict.fromkeys(layers, nothing) if layers else nothing
    return args, kwargs


@contextmanager
def attention_by_row(language_model: Any) -> Iterator[bool]:
    """While it lasts, a language model on `sdpa` attends to packs row by row; any other is left as it is.

    Yields:
        Whether it does.
    """
    if language_model.config._attn_implementation != "sdpa":
        yield False
        return
    language_model.set_attn_implementation(NAME)
    hook = language_model.get_decoder().register_forward_pre_hook(_pass_lengths, with_kwargs=True, prepend=True)
    try:
        yield True
    finally:
        hook.remove()
        language_model.set_attn_implementation("sdpa")
