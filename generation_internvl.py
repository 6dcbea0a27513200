"""Generation arguments of a conversation: what the caller asked for, plus the right stop and pad tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

# Where a caller sets no limit: transformers' own default of 20 tokens would cut answers in mid-sentence.
DEFAULT_MAX_NEW_TOKENS = 1024


def id_list(value: Any) -> list[int]:
    """Ids given as nothing, a number, a list or a tensor."""
    if value is None:
        return []
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    return [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]


def stop_ids(*values: Any) -> list[int]:
    """All of these ids (see `id_list`), each once, in order."""
    return list(dict.fromkeys(number for value in values for number in id_list(value)))


def generation_options(
    model: Any, tokenizer: Any, end_of_turn: int | None, generation_config: dict[str, Any] | GenerationConfig | None
) -> dict[str, Any]:
    """Arguments for `generate`: the caller's, with every stop token that applies and a pad token.

    Args:
        model: Its `generation_config` stands behind the caller's.
        tokenizer: Gives its end-of-sequence and pad tokens.
        end_of_turn: Id of the template's end of turn, None where the tokenizer does not know it.
        generation_config: From the caller; not changed.

    Raises:
        TypeError: `generation_config` is neither a dictionary nor a `GenerationConfig`.
    """
    if not isinstance(generation_config, (dict, GenerationConfig, type(None))):
        kind = type(generation_config).__name__
        raise TypeError(f"generation_config must be a dictionary or a GenerationConfig, got {kind}.")
    options = dict(generation_config) if isinstance(generation_config, dict) else {}
    given = generation_config if isinstance(generation_config, GenerationConfig) else None
    given = options.pop("generation_config", given)
    if isinstance(options.get("stopping_criteria"), StoppingCriteria):  # transformers takes one for a list of one
        options["stopping_criteria"] = StoppingCriteriaList([options["stopping_criteria"]])
    values: dict[str, Any] = {}
    own = (end_of_turn, tokenizer.eos_token_id, model.generation_config.eos_token_id)
    stops = stop_ids(*own, options.get("eos_token_id"), getattr(given, "eos_token_id", None))
    values["eos_token_id"] = stops or None
    pads = (options.get("pad_token_id"), getattr(given, "pad_token_id", None), tokenizer.pad_token_id)
    values["pad_token_id"] = next((p for p in pads if p is not None), stops[0] if stops else 0)
    limits = ("max_new_tokens", "max_length")
    sources = (given, model.generation_config)
    limited = any(getattr(source, name, None) is not None for source in sources for name in limits)
    if not limited and all(options.get(name) is None for name in limits):
        values["max_new_tokens"] = DEFAULT_MAX_NEW_TOKENS
    if given is None:
        return {**options, **values}
    given = copy.deepcopy(given)  # transformers takes generation arguments or such an object, not both
    for name, value in values.items():
        options.pop(name, None)
        setattr(given, name, value)
    return {**options, "generation_config": given}


def option(model: Any, options: dict[str, Any], name: str) -> Any:
    """The value that a generation with these arguments would use for `name`."""
    given = options.get("generation_config")
    for source in (options, {} if given is None else vars(given)):
        if source.get(name) is not None:
            return source[name]
    return getattr(model.generation_config, name, None)


def ordinary_cache(model: Any, options: dict[str, Any]) -> bool:
    """Whether a generation with these arguments uses a cache of its own, of the ordinary kind."""
    custom = ("cache_implementation", "past_key_values", "prefill_chunk_size", "assistant_model")
    plain = not any(option(model, options, name) for name in custom)
    return plain and option(model, options, "use_cache") is not False


def cacheable(model: Any, options: dict[str, Any]) -> bool:
    """Whether the session's cache can serve this generation: one sequence, ordinary cache."""
    single = all((option(model, options, name) or 1) == 1 for name in ("num_beams", "num_return_sequences"))
    return single and ordinary_cache(model, options)


@contextmanager
def without_checkpointing(model: Any) -> Iterator[None]:
    """Turns activation checkpointing off: where it is on, a model in training mode leaves its cache empty."""
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in checkpointed:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True
