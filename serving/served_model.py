"""The model as transformers' handlers see it: where it is, how it generates by default, and `generate`.

It adds stop tokens, seeds and limits, and drops what a template writes before an answer. Nothing here reads requests.

"""

from __future__ import annotations

import json
from typing import Any

import torch

from ..conversation import get_template
from ..generation_internvl import generation_options
from ..prompting_internvl import USER_MARKUP, prompt_encoder
from ..turns_internvl import input_device


class ServedModel:
    """What transformers' handlers see of the model: where it is, how it generates by default, and `generate`.

    Args:
        model: An `InternVLChatModel`; it is put into evaluation mode.
        processor: Its processor.
        parses: Show the language model's configuration as the model's: transformers knows by `model_type` how Qwen
            writes tool calls and thoughts, and takes them out of the answer.
    """

    def __init__(self, model: Any, processor: Any, parses: bool = False) -> None:
        self.model, self.processor = model.eval(), processor
        text = model.config.get_text_config()
        self.config = text if parses else model.config
        self.device, self.name_or_path = input_device(model), getattr(model, "name_or_path", "")
        self.context = text.max_position_embeddings
        self.generation_config = served_generation_config(model, processor)
        header = get_template(processor.template).answer_prefix.strip()
        self.header = processor.tokenizer(header, add_special_tokens=False)["input_ids"] if header else []

    def generate(self, *, generation_config: Any, tokenizer: Any = None, **inputs: Any) -> torch.Tensor:
        """As the model's, with the request's seed, and no more tokens than it has positions for.

        `max_new_tokens` is lowered in the configuration itself, from which the handlers tell why an answer ended.
        """
        room = self.context - inputs["input_ids"].shape[-1]
        generation_config.max_new_tokens = min(generation_config.max_new_tokens or room, room)
        seed = vars(generation_config).pop("request_seed", None)
        if seed is not None:  # here, in the one thread that generates: not while another answer is being drawn
            torch.manual_seed(seed)
        options = {"generation_config": generation_config, "tokenizer": self.processor.tokenizer}
        if self.header and "streamer" in inputs:
            inputs["streamer"] = _WithoutHeader(inputs["streamer"], self.header, generation_config)
        try:
            output = self.model.generate(**inputs, **options)
        except (ValueError, RuntimeError) as error:
            if "streamer" not in inputs:
                raise
            # The handlers put the message between quotes into the stream as it is.
            raise RuntimeError(json.dumps(str(error))[1:-1]) from error
        start = inputs["input_ids"].shape[-1]
        end = start + len(self.header)
        if "streamer" in inputs or not self.header or output[0, start:end].tolist() != self.header:
            return output
        generation_config.max_new_tokens -= len(self.header)
        return torch.cat([output[:, :start], output[:, end:]], dim=1)


class _WithoutHeader:
    """A streamer that keeps from another one the header that a model writes before its answer (gpt-oss: its channel).

    The header counts neither as tokens of the answer nor against their number, as in `ServedModel.generate`.
    """

    def __init__(self, streamer: Any, header: list[int], generation_config: Any) -> None:
        self.streamer, self.header, self.generation_config = streamer, header, generation_config
        self.prompt_seen, self.held = False, []  # type: bool, list[int] | None

    def put(self, value: torch.Tensor) -> None:
        """Passes on the prompt, and new tokens once it is known whether they are the header."""
        if not self.prompt_seen or self.held is None:
            self.prompt_seen = True
            return self.streamer.put(value)
        self.held += value.flatten().tolist()
        if self.held == self.header:
            self.held = None
            self.generation_config.max_new_tokens -= len(self.header)
        elif self.held != self.header[: len(self.held)]:
            self._release()
        return None

    def _release(self) -> None:
        held, self.held = self.held, None
        if held:
            self.streamer.put(torch.tensor(held))

    def end(self) -> None:
        """Passes on what was held back, and the end."""
        self._release()
        self.streamer.end()


def served_generation_config(model: Any, processor: Any) -> Any:
    """The model's generation settings with all stop tokens of `model.chat`, and no `top_k` but a stored one."""
    tokenizer = processor.tokenizer
    encoder = prompt_encoder(tokenizer)
    end_of_turn = encoder.token_id(get_template(processor.template).end_of_turn)
    if model.img_context_token_id is None:
        model.img_context_token_id = encoder.context_id
    stored = model.generation_config
    config = generation_options(model, tokenizer, end_of_turn, stored)["generation_config"]
    config.top_k = stored.top_k if stored.top_k is not None else 0
    return config


def keep_markup(tokenizer: Any) -> None:
    """Makes grounding markup ordinary tokens, which `skip_special_tokens` does not drop; ids stay the same."""
    from tokenizers import Tokenizer

    backend = json.loads(tokenizer._tokenizer.to_str())
    for token in backend["added_tokens"]:
        token["special"] &= token["content"] not in USER_MARKUP
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))
