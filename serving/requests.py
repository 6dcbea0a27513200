"""Bodies of requests: checked, and turned into ones that transformers' handlers take as they are.

Prompts are rendered there; what would be passed over silently, or would load templates and files, is refused here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from PIL import Image

from .request_images import data_url_bytes, decoded, fetch, image_size
from .request_sampling import check_sampling
from .settings import Refused, ServeSettings

_TEXTS = ("text", "input_text", "output_text")
_IMAGES = ("image_url", "input_image")
_TILES = ("max_dynamic_patch", "max_num")
# What transformers' handlers pass over though answers depend on it, and the values that say nothing.
_UNKEPT: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "conversation": (),
    "logprobs": (False,),
    "presence_penalty": (0,),
    "previous_response_id": (),
    "response_format": ({"type": "text"},),
    "text": ({"format": {"type": "text"}},),
    "tool_choice": ("auto",),
}


class RequestReader:
    """Turns the body of a request into one that transformers' handlers can take as it is.

    Args:
        processor: Of the model.
        context: Tokens that prompt and answer may have together.
        settings: How the model is served.
        tools: Whether the model knows tools.
    """

    def __init__(self, processor: Any, context: int, settings: ServeSettings, tools: bool) -> None:
        self.processor, self.context, self.settings, self.tools = processor, context, settings, tools

    def read(self, body: dict[str, Any]) -> dict[str, Any]:
        """A copy of the body, checked, whose images are pictures instead of addresses.

        Raises:
            Refused: it is none that can be answered.
        """
        body = {"stream": False, **{key: value for key, value in body.items() if value is not None}}
        check_sampling(body, self.settings.limits)
        if body.get("tool_choice") == "none":
            body = {key: value for key, value in body.items() if key not in ("tools", "tool_choice")}
        for name, values in _UNKEPT.items():
            if name in body and body[name] not in values:
                raise Refused(f"{name}={body[name]!r:.80} is not supported; leave it out")
        self._check_tools(body)
        images: list[dict[str, Any]] = []
        if "messages" in body or "input" not in body:
            body["messages"] = [_message(item, images) for item in _listed(body.get("messages"), "messages")]
        elif not isinstance(body["input"], str):
            body["input"] = [_item(item, images) for item in _listed(body["input"], "input")]
        tiles = self._max_tiles(body)
        for part, picture in zip(images, self._pictures([part["image_url"] for part in images], tiles), strict=True):
            part["image_url"] = picture
        # The rest of what the processor takes would let a request replace templates, limits and images.
        body["chat_template_kwargs"] = {**tiles, "max_length": self.context - 1}
        return body

    def _check_tools(self, body: dict[str, Any]) -> None:
        for i, tool in enumerate(_listed(body.get("tools", []), "tools", empty=True)):
            function = tool.get("function", tool) if isinstance(tool, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise Refused(f"tools[{i}] is no function with a name")
        if body.get("tools") and not self.tools:
            raise Refused("this model was not trained on tool calls; describe the tools in the system message instead")

    def _max_tiles(self, body: dict[str, Any]) -> dict[str, int]:
        """The image processor's argument for the most tiles of an image, as asked for and as allowed."""
        allowed = self.settings.max_tiles or self.processor.image_processor.max_dynamic_patch
        asked = {}
        for name in ("mm_processor_kwargs", "chat_template_kwargs"):
            options = body.pop(name, {})
            if not isinstance(options, dict) or set(options) - set(_TILES):
                raise Refused(f"{name} may only have {' or '.join(_TILES)}, the most tiles of an image")
            asked.update(options)
        for name, value in asked.items():
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= allowed:
                raise Refused(f"{name} must be a whole number from 1 to {allowed}, got {value!r:.40}")
        tiles = min([allowed, *asked.values()])
        least = min(tiles, self.processor.image_processor.min_dynamic_patch)
        return {"max_dynamic_patch": tiles, "min_dynamic_patch": least}

    def _pictures(self, urls: Sequence[Any], tiles: dict[str, int]) -> list[Image.Image]:
        """The images, all checked by their headers before the first is decoded."""
        limits = self.settings.limits
        if len(urls) > limits.images:
            raise Refused(f"{len(urls)} images are too many; at most {limits.images} are taken", 413)
        files = [self._file(url, f"image {i + 1}") for i, url in enumerate(urls)]
        sizes = [image_size(data, f"image {i + 1}", limits) for i, data in enumerate(files)]
        if (pixels := sum(width * height for width, height in sizes)) > limits.pixels:
            raise Refused(f"the images have {pixels:,} pixels; at most {limits.pixels:,} are taken", 413)
        counts = self.processor.image_processor.num_tiles_per_image(sizes, **tiles) if sizes else []
        tokens = sum(sum(self.processor.tokens_per_tile(count)) for count in counts)
        if tokens >= self.context:
            raise Refused(
                f"the images make {sum(counts)} tiles and {tokens:,} tokens, and the model has {self.context:,} "
                "positions; send fewer images, or lower max_dynamic_patch in mm_processor_kwargs"
            )
        return [decoded(data, f"image {i + 1}") for i, data in enumerate(files)]

    def _file(self, url: Any, name: str) -> bytes:
        limits, hosts = self.settings.limits, self.settings.url_hosts
        start = url[:8].lower() if isinstance(url, str) else ""
        if start.startswith("data:"):
            data = data_url_bytes(url, name)
        elif start.startswith(("http://", "https://")) and hosts:
            data = fetch(url, hosts, limits.image_bytes, limits.fetch_seconds, name)
        else:
            fetched = (
                f" or an http(s) address on {', '.join(hosts)}" if hosts else "; this server fetches no addresses"
            )
            raise Refused(f"{name} must be a data URL such as data:image/png;base64,...{fetched}")
        if not 0 < len(data) <= limits.image_bytes:
            raise Refused(f"{name} has {len(data):,} bytes; at most {limits.image_bytes:,} are taken, at least 1", 413)
        return data


def _listed(value: Any, name: str, empty: bool = False) -> list[Any]:
    if not isinstance(value, list) or not (value or empty):
        raise Refused(f"{name} must be a list" + " that is not empty" * (not empty))
    return value


def _message(message: Any, images: list[dict[str, Any]]) -> dict[str, Any]:
    """A copy of a message; parts with images, whose `image_url` is their address alone, are appended to `images`."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise Refused("a message must be an object with a role")
    message = {key: value for key, value in message.items() if value is not None}
    content = message.get("content", "")
    if not isinstance(content, str):
        message["content"] = [_part(part, images) for part in _listed(content, "content", empty=True)]
    if "tool_calls" in message:
        for call in _listed(message["tool_calls"], "tool_calls", empty=True):
            _check_call(call.get("function", call) if isinstance(call, dict) else None)
        if not message["tool_calls"]:  # some clients send none as an empty list, and transformers would drop the text
            del message["tool_calls"]
    return message


def _part(part: Any, images: list[dict[str, Any]]) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _TEXTS and isinstance(part.get("text"), str):
        return part
    if kind not in _IMAGES:
        raise Refused(
            f"a content part of type {kind!r:.40} cannot be taken; text with its text, image_url and input_image can. "
            "Send the frames of a video as images."
        )
    url = part.get("image_url")
    images.append({"type": kind, "image_url": url.get("url") if isinstance(url, dict) else url})
    return images[-1]


def _item(item: Any, images: list[dict[str, Any]]) -> dict[str, Any]:
    """An item of the input of `/v1/responses`: a message, a part of one, or something of an earlier response."""
    kind = item.get("type") if isinstance(item, dict) else None
    if kind in (*_TEXTS, *_IMAGES):
        return _part(item, images)
    if kind == "function_call":
        _check_call(item)
        return {"call_id": "", **item}
    if kind == "function_call_output":
        if not isinstance(item.get("output"), str):
            raise Refused("the output of a function_call_output must be a string")
        return {"call_id": "", **item}
    if kind == "reasoning":
        return {"type": kind}  # thoughts of earlier turns are no part of a prompt
    return _message(item, images)


def _check_call(function: Any) -> None:
    """Raises `Refused` unless it names a function, and its arguments are an object, or JSON text that is one."""
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict) or not isinstance(function.get("name"), str):
        raise Refused("a tool call must have the name of a function and arguments that are a JSON object")
