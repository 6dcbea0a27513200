"""`generate` for prompts with images: what transformers' decoding loop is given, for draft models and samples too.

The loop itself is transformers'. Which generation arguments a conversation uses is `generation_internvl.py`.
"""

from __future__ import annotations

from typing import Any

import torch

from .generation_internvl import option, without_checkpointing
from .sampling_internvl import prefill_once, shares_prompt

_IMAGES = ("pixel_values", "visual_features", "image_flags", "tile_index", "num_patches")


class InternVLDecodingMixin:
    """Methods of `InternVLChatModel`; stands before transformers' `GenerationMixin`."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: Any = None,
        pixel_values: torch.FloatTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        visual_features: torch.FloatTensor | None = None,
        image_flags: torch.Tensor | None = None,
        num_patches: Any = None,
        tile_index: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generates as transformers' `generate` does.

        With `input_ids` given the output starts with them, as for every transformers model (the original code returned
        the new tokens only); with `inputs_embeds` alone it holds the new tokens. Beams and `num_return_sequences` see
        the right images, which are encoded once; sampled sequences also share the computation of their prompt
        (`sampling_internvl.py`).

        Args:
            inputs: Prompt ids (B, L), positional as in transformers; same as `input_ids`.
            generation_config: A `GenerationConfig`.
            pixel_values, visual_features, image_flags, tile_index: As in `forward`.
            num_patches: Accepted from the processor's output.
            **kwargs: Any of transformers' generation arguments.

        Raises:
            VisualTokenMismatchError, ValueError: as in `forward`.
            ValueError: `prefill_chunk_size` with embeddings, which transformers does not cut.
        """
        input_ids = inputs if input_ids is None else input_ids
        if input_ids is not None and input_ids.is_floating_point():
            raise TypeError("The first argument of generate() is input_ids; pass images as pixel_values=...")
        has_images = pixel_values is not None or visual_features is not None
        # With both, this is a draft model, and the embeddings are those of the model that it helps.
        if has_images and input_ids is not None and (kwargs.get("inputs_embeds") is None or pixel_values is not None):
            images = {"pixel_values": pixel_values, "image_flags": image_flags, "tile_index": tile_index}
            done = _cached(input_ids, kwargs.get("past_key_values"), self.img_context_token_id)
            embeds = None if done else self.embed_prompt(input_ids, visual_features=visual_features, **images)
            kwargs["inputs_embeds"] = embeds
            drafting, draft = getattr(generation_config, "is_assistant", False), kwargs.get("assistant_model")
            if drafting or hasattr(draft, "embed_prompt"):  # draft models look for themselves
                kwargs |= {name: value for name, value in images.items() if value is not None}
            if hasattr(draft, "embed_prompt") and draft.img_context_token_id is None:
                draft.img_context_token_id = self.img_context_token_id  # released checkpoints leave it to `chat`
        if input_ids is not None:
            kwargs["input_ids"] = input_ids
        kwargs |= {"generation_config": generation_config, "attention_mask": attention_mask}
        if kwargs.get("inputs_embeds") is not None and option(self, kwargs, "prefill_chunk_size"):
            raise ValueError("prefill_chunk_size cuts token ids alone: leave it out for prompts with images.")
        if isinstance(kwargs.get("cache_config"), dict):  # transformers 5.11 takes the caller's own apart
            kwargs["cache_config"] = dict(kwargs["cache_config"])
        with without_checkpointing(self):
            return super().generate(**(prefill_once(self, kwargs) if shares_prompt(self, kwargs) else kwargs))

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers; decoding text without a cache, a context token that the model wrote is text too.

        (With embeddings as input, and so with images, transformers always uses a cache.)
        """
        looking = kwargs.get("pixel_values") is not None and inputs_embeds is not None and past_key_values is not None
        if looking and not is_first_iteration and int(past_key_values.get_seq_length()) == 0:
            is_first_iteration = True  # transformers says no to a draft model, whose calls share a cache
        if past_key_values is not None and (inputs_embeds is not None or not is_first_iteration):
            # The images are in the embeddings or in the cache; these are for a draft model.
            kwargs = {name: value for name, value in kwargs.items() if name not in _IMAGES}
        if is_first_iteration and inputs_embeds is not None and input_ids.shape[1] > inputs_embeds.shape[1]:
            # Assisted decoding checks proposed tokens together with the prompt; transformers embeds the prompt alone.
            proposed = self.get_input_embeddings()(input_ids[:, inputs_embeds.shape[1] :])
            inputs_embeds = torch.cat([inputs_embeds, proposed.to(inputs_embeds)], dim=1)
        has_images = kwargs.get("pixel_values") is not None or kwargs.get("visual_features") is not None
        if past_key_values is None and inputs_embeds is None and not is_first_iteration and not has_images:
            inputs_embeds, is_first_iteration = self.get_input_embeddings()(input_ids), True
        return super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )


def _cached(input_ids: torch.Tensor, past_key_values: Any, context_token: int | None) -> bool:
    """Whether the cache holds the images already: text alone is left to run."""
    length = 0 if past_key_values is None else int(past_key_values.get_seq_length())
    return length > 0 and not bool((input_ids[:, length:] == context_token).any())
