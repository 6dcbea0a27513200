"""What one conversation can keep between turns: visual features and the key/value cache of its common prefix.

A `ChatSession` never decides what the prompt is: it is shown each turn's freshly tokenised prompt and keeps the
longest prefix that equals what it has cached. So greedy tokens equal those of recomputing, whatever the caller edits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from .prompting_internvl import EncodedPrompt


def rope_limit(config: Any) -> tuple[str, int] | None:
    """Type and length limit of a position encoding that changes with sequence length; None if none does."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [r for r in (rope, *rope.values()) if isinstance(r, dict)]
    for r in kinds:
        kind = r.get("rope_type")
        if kind in ("dynamic", "longrope"):
            limit = r.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            return kind, int(limit or text.max_position_embeddings)
    return None


def image_digest(tiles: torch.Tensor) -> bytes:
    """Fingerprint of an image's tiles (n, 3, S, S): equal exactly when dtype, shape and values are."""
    data = tiles.detach().contiguous().cpu()
    header = f"{data.dtype}{tuple(data.shape)}".encode()
    return hashlib.blake2b(header + data.view(torch.uint8).numpy().tobytes(), digest_size=16).digest()


class ChatSession:
    """Reuses visual features and key/value cache across the turns of one conversation.

    Pass the same object as `session=` to every `chat` or `stream_chat` call of a conversation. The cache is dropped,
    and the turn recomputed, where it cannot be cut back (a full sliding window, a recurrent state) or where the
    position encoding changes with length (dynamic NTK and LongRoPE beyond their original length).

    Args:
        model: The model whose conversation it is. After changing its weights call `reset`.
        reuse: False for a single turn, which then need not fingerprint its images.

    Attributes:
        reused_tokens: Prompt tokens of the last turn that came from the cache.
        encoded_images: Images of the last turn that had to be encoded.
    """

    def __init__(self, model: PreTrainedModel, reuse: bool = True) -> None:
        self.model, self._reuse, self._adapters = model, reuse, _active_adapters(model)
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._features: dict[bytes, torch.Tensor] = {}
        self._drop_cache()
        self.reused_tokens = 0
        self.encoded_images = 0

    def follow(self, model: PreTrainedModel) -> None:
        """Forgets everything if other adapters are active than in the last turn.

        Raises:
            ValueError: the session is that of another model.
        """
        if model is not self.model:
            raise ValueError("This session belongs to another model: begin one with this model's new_session().")
        adapters = _active_adapters(model)
        if adapters != self._adapters:
            self.reset()
            self._adapters = adapters

    def _drop_cache(self) -> None:
        self._cache: DynamicCache | None = None
        self._keys: list[int] = []
        self._long = False

    # -------------------------------------------------------------------------------------------------------- features

    def encode_images(self, pixel_values: torch.Tensor | None, num_patches_list: Sequence[int]) -> list[bytes]:
        """Makes sure that every image's features are at hand; forgets those of images no longer in the conversation.

        Args:
            pixel_values: (tiles, 3, S, S) of all images.
            num_patches_list: Tiles of each image.

        Returns:
            Each image's digest, in order.
        """
        tiles = () if pixel_values is None else pixel_values.split(list(num_patches_list))
        digests = [image_digest(image) if self._reuse else i.to_bytes(4, "big") for i, image in enumerate(tiles)]
        new = [i for i, digest in enumerate(digests) if digest not in self._features]
        self.encoded_images = len(new)
        known = {digest: self._features[digest] for digest in digests if digest in self._features}
        if new:
            features = self.model.extract_feature(torch.cat([tiles[i] for i in new]))
            known.update(zip((digests[i] for i in new), features.split([len(tiles[i]) for i in new]), strict=True))
        self._features = known
        return digests

    def features(self, digests: Sequence[bytes]) -> torch.Tensor | None:
        """Features of images, (tokens, D), or None without any."""
        if not digests:
            return None
        return torch.cat([self._features[digest].flatten(0, 1) for digest in digests])

    # ----------------------------------------------------------------------------------------------------------- cache

    @staticmethod
    def prompt_keys(prompt: EncodedPrompt, digests: Sequence[bytes]) -> list[int]:
        """Ids, visual positions replaced by (negative) names of image and offset, so that only like matches like."""
        keys = list(prompt.input_ids)
        for span, digest in zip(prompt.spans, digests, strict=True):
            base = int.from_bytes(digest, "big") << 32
            keys[span.start : span.start + span.length] = [-1 - base - offset for offset in range(span.length)]
        return keys

    def cache_for(self, keys: list[int]) -> DynamicCache:
        """A cache holding the longest usable prefix of `keys`; generation fills it up.

        Until `commit` the session remembers nothing of it, so that an interrupted turn leaves no half-known state.
        """
        cache, common = self._cache, self._common_prefix(keys)
        self._drop_cache()
        if cache is None or common == 0 or not _crop(cache, common):
            cache, common = DynamicCache(config=self.model.config), 0
        self.reused_tokens = common
        return cache

    def _common_prefix(self, keys: list[int]) -> int:
        limit = rope_limit(self.model.config)
        if limit is not None:
            long = len(keys) > limit[1]
            # From its limit on dynamic NTK has other frequencies for every length; LongRoPE has one set beyond it.
            if long != self._long or (len(keys) >= limit[1] and limit[0] == "dynamic"):
                return 0
        # At least one token must be run to get the next one's logits.
        longest = min(len(keys) - 1, len(self._keys))
        return next((i for i in range(longest) if keys[i] != self._keys[i]), longest)

    def commit(self, cache: DynamicCache, keys: list[int], new_ids: Sequence[int]) -> None:
        """Remembers what a finished turn left in `cache`: its prompt and all but the last of its `new_ids`."""
        limit = rope_limit(self.model.config)
        stored = [*keys, *new_ids][: cache.get_seq_length()]
        self._long = limit is not None and len(keys) > limit[1]
        if limit is not None and not self._long:
            stored = stored[: limit[1]]  # tokens generated past the limit carry other frequencies
        self._cache, self._keys = cache, stored


def _active_adapters(model: PreTrainedModel) -> set[tuple[Any, ...]]:
    """What peft's layers of a model add to its weights: names, and whether they are switched off."""
    # A property of peft's layers; models of transformers have a method of that name.
    layers = (module for module in model.modules() if isinstance(getattr(module, "disable_adapters", None), bool))
    return {(layer.disable_adapters, *layer.active_adapters) for layer in layers}


def _crop(cache: DynamicCache, length: int) -> bool:
    """Cuts a cache back to `length` tokens; False where it cannot be."""
    for layer in cache.layers:
        window = getattr(layer, "sliding_window", None)
        if not isinstance(getattr(layer, "keys", None), torch.Tensor) or hasattr(layer, "conv_states"):
            return False
        if window is not None and layer.get_seq_length() >= window:
            return False
    surplus = cache.get_seq_length() - length
    if surplus:  # older versions take 0 for "drop everything"
        cache.crop(-surplus)
    return True
