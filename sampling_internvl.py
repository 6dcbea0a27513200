"""Several sampled continuations of one prompt, which is computed once.

transformers' `generate` repeats a prompt `num_return_sequences` times and then runs all copies through the model.
With thousands of visual tokens that is most of the work; here the prompt runs once and its key/value cache is
repeated. What cannot be done that way (beams, caches of other kinds, recurrent models) is left to transformers.
"""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .generation_internvl import option, ordinary_cache
from .session_internvl import rope_limit

# Outputs and ways of decoding that look at the prompt's own forward pass, or run another one.
_NEEDS_PROMPT = ("output_attentions", "output_hidden_states", "guidance_scale", "custom_generate")


def shares_prompt(model: Any, options: dict[str, Any]) -> bool:
    """Whether `prefill_once` gives what `generate` with these arguments would.

    Args:
        model: The `InternVLChatModel`.
        options: Arguments of `generate`: `input_ids` (B, L), `inputs_embeds` (B, L, D) or both among them.
    """
    count = option(model, options, "num_return_sequences") or 1
    single_beam = (option(model, options, "num_beams") or 1) == 1
    if count == 1 or not single_beam or not option(model, options, "do_sample") or not ordinary_cache(model, options):
        return False
    mask = options.get("attention_mask")
    if mask is None or mask.shape[1] < 2:
        return False
    given = (options.get(name) for name in ("position_ids", "synced_gpus", *_NEEDS_PROMPT))
    if any(value not in (None, False) for value in (*given, *(option(model, options, n) for n in _NEEDS_PROMPT))):
        return False
    return _can_repeat_cache(model, mask.shape[1])


def _can_repeat_cache(model: Any, length: int) -> bool:
    language_model = model.language_model
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or getattr(text, "block_types", None) or ()
    if not all(kind.endswith("attention") for kind in kinds):  # some versions give recurrent layers ordinary caches
        return False
    if getattr(language_model, "_is_stateful", False) or not language_model._supports_default_dynamic_cache():
        return False
    limit = rope_limit(model.config)
    if limit is not None and length > limit[1]:  # the frequencies of the prompt would be those of one token less
        return False
    layers = DynamicCache(config=text).layers
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def prefill_once(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Runs all of the prompt but its last token, and repeats the prompt and its cache.

    Args:
        model: The `InternVLChatModel`.
        options: As for `shares_prompt`; not changed.

    Returns:
        Arguments to generate one sequence from each of B x num_return_sequences prompts.
    """
    count, mask = option(model, options, "num_return_sequences"), options["attention_mask"]
    embeds = options.get("inputs_embeds")
    if embeds is None:
        embeds = model.get_input_embeddings()(options["input_ids"])
    cache = DynamicCache(config=model.config.get_text_config())
    model.language_model.get_decoder()(
        inputs_embeds=embeds[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=(mask.long().cumsum(-1) - 1).clamp(min=0)[:, :-1],
        past_key_values=cache,
        use_cache=True,
    )
    cache.batch_repeat_interleave(count)
    prompt = {name: options.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask")}
    repeated = {name: t.repeat_interleave(count, dim=0) for name, t in prompt.items() if t is not None}
    return {**options, **repeated, "past_key_values": cache, "num_return_sequences": 1}
