"""Processor of InternVL: text or messages with images and video frames, to the inputs of `forward` and `generate`.

Messages are tokenised part by part, so that what a user typed can never become template markup or an image slot. Text
given to `processor(text=...)` is trusted markup. Images go through `InternVLImageProcessor`, ids come from
`prompting_internvl.py`: the very functions that `chat` and training use.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from .configuration_internvl_chat import InternVLChatConfig
from .conversation import (
    IMAGE_PLACEHOLDER,
    Segment,
    TemplateError,
    chat_template,
    conversation_from_messages,
    get_conv_template,
    get_template,
    template_names,
    video_frames,
)
from .image_processing_internvl import InternVLImageProcessor
from .prompting_internvl import EncodedPrompt, TokenizerError, check_image_count, prompt_encoder

VIDEO_PLACEHOLDER = "<video>"
_MEDIA = re.compile(f"({re.escape(IMAGE_PLACEHOLDER)}|{re.escape(VIDEO_PLACEHOLDER)})")
_TEXT_OPTIONS = (
    "padding",
    "padding_side",
    "pad_to_multiple_of",
    "return_tensors",
    "max_length",
    "truncation",
    "add_special_tokens",
)
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
_PUSH_OPTIONS = ("repo_id", "commit_message", "private", "token", "revision", "create_pr")
_SETTINGS = "_image_settings"
_IMAGE_SOURCES = ("image", "url", "path", "image_url", "base64")


class PromptTooLongError(ValueError):
    """A prompt exceeds the `max_length` that the caller set; prompts are never truncated."""


@dataclass
class _Row:
    """One prompt: its segments, and its media in order as (source, is a video frame)."""

    segments: list[Segment]
    media: list[tuple[Any, bool]]
    bos: bool = True


def make_readable_by_v4(path: Path) -> None:
    """Rewrites two fields of a `tokenizer_config.json` that transformers 5 writes in ways 4 cannot read."""
    if not path.is_file():
        return
    values = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _model_config(name_or_path: Any, options: dict[str, Any]) -> InternVLChatConfig:
    where = {name: options[name] for name in _HUB_OPTIONS if name in options}
    return InternVLChatConfig.from_pretrained(name_or_path, **where)


def image_settings(config: InternVLChatConfig) -> dict[str, Any]:
    """Arguments of the `InternVLImageProcessor` that fits a model."""
    names = ("min_dynamic_patch", "max_dynamic_patch", "dynamic_image_size", "use_thumbnail", "pad2square")
    return {"image_size": config.image_size, **{name: getattr(config, name) for name in names}}


class InternVLProcessor(ProcessorMixin):
    """Tokenizer and image processor together (`AutoProcessor`).

    Args:
        image_processor: An `InternVLImageProcessor`.
        tokenizer: The checkpoint's tokenizer.
        template: Name of the conversation template in `conversation.py`.
        num_image_token: Visual tokens per tile.
        system_message: Default system text; None for the template's own.
        chat_template: Jinja template for text rendering; None writes the one of `template`.
        return_num_patches: Return `num_patches` with the tiles; False for callers that know no such output, such as
            TRL's `GRPOTrainer`.

    Raises:
        TemplateError: unknown template.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        template: str = "internvl2_5",
        num_image_token: int = 256,
        system_message: str | None = None,
        chat_template: str | None = None,
        return_num_patches: bool = True,
        **kwargs: Any,
    ) -> None:
        self.template = template
        self.return_num_patches = return_num_patches
        self.num_image_token = num_image_token
        self.system_message = system_message
        chat_template = chat_template or _default_chat_template(template, tokenizer, system_message)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token = IMAGE_PLACEHOLDER

    @classmethod
    def from_model_config(cls, config: Any, tokenizer: Any, **settings: Any) -> InternVLProcessor:
        """The processor that fits a model.

        Args:
            config: `InternVLChatConfig`.
            tokenizer: The checkpoint's tokenizer.
            **settings: Fields of `InternVLImageProcessor` that the configuration does not know.
        """
        return cls(
            InternVLImageProcessor(**{**image_settings(config), **settings}),
            tokenizer,
            template=config.template,
            num_image_token=config.tokens_per_tile(1)[0],
            system_message=config.system_message,
        )

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """As the base class; the tokenizer's file stays readable by transformers 4."""
        hub = {name: kwargs.pop(name) for name in _PUSH_OPTIONS if push_to_hub and name in kwargs}
        saved = super().save_pretrained(save_directory, **kwargs)
        make_readable_by_v4(Path(save_directory) / "tokenizer_config.json")
        if push_to_hub:  # the base class would push before the file is mended
            self.push_to_hub(**{"repo_id": Path(save_directory).name, **hub})
        return saved

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """As the base class; where no processor of this class was saved, its fields follow from the model's config.

        That is so for released repositories and for transformers' own InternVL.
        """
        values, unused = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "template" not in values:
            config = _model_config(pretrained_model_name_or_path, kwargs)
            tiles_saved = "image_seq_length" in values
            values = {
                "template": config.template,
                "num_image_token": config.tokens_per_tile(1)[0],
                "system_message": config.system_message,
                _SETTINGS: {} if tiles_saved else image_settings(config),
            }
        return values, unused

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        # This file's own image processor, not the one that a repository's auto_map names: it needs no remote code.
        settings = (processor_dict or {}).pop(_SETTINGS, {})
        image_processor = (
            InternVLImageProcessor(**settings)
            if settings
            else InternVLImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        )
        if kwargs.get("trust_remote_code") is None:  # else AutoTokenizer asks about the model's code, needing none
            kwargs["config"] = _model_config(pretrained_model_name_or_path, kwargs)
        return [
            image_processor,
            cls._load_tokenizer_from_pretrained("tokenizer", pretrained_model_name_or_path, **kwargs),
        ]

    @property
    def model_input_names(self) -> list[str]:
        """Keys of the output."""
        return ["input_ids", "attention_mask", "pixel_values", "num_patches"]

    # ---------------------------------------------------------------------------------------------------- trusted text

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Encodes prompts that are already text.

        The text is TRUSTED: special tokens in it are special tokens. For what users typed use `apply_chat_template`.

        Args:
            images: One image, a list for the whole batch in order, or a list per prompt: PIL images, paths, URLs,
                bytes, arrays. Each `<image>` in the text stands for one.
            text: A prompt or several.
            videos: Lists of frames; each `<video>` becomes one `Frame-i: <image>` line per frame, one tile each.
            audio: Must be None.
            **kwargs: `padding`, `padding_side` (left unless given), `pad_to_multiple_of`, `return_tensors`,
                `max_length`, `add_special_tokens`, and any field of the image processor (`max_num`, `exact`, ...).

        Returns:
            `input_ids`, `attention_mask` (B, L), `pixel_values` (tiles, 3, S, S), `num_patches` (images).

        Raises:
            ImageCountError: placeholders and images differ in number.
            PromptTooLongError: a prompt is longer than `max_length`.
            ValueError: audio is given, or neither text nor images.
        """
        if audio is not None:
            raise ValueError("InternVL has no audio input.")
        text_options, image_options = _split_options(kwargs)
        if text is None:
            if images is None:
                raise ValueError("Give text, images or both.")
            return self.image_processor(images, return_tensors=text_options.get("return_tensors"), **image_options)
        single = isinstance(text, str)
        rows = self._rows_of_text([text] if single else list(text), images, videos, text_options)
        return self._encode_rows(rows, single, text_options, image_options)

    def _rows_of_text(self, texts: list[str], images: Any, videos: Any, options: dict[str, Any]) -> list[_Row]:
        counts = [len(re.findall(re.escape(IMAGE_PLACEHOLDER), text)) for text in texts]
        clips = [len(re.findall(re.escape(VIDEO_PLACEHOLDER), text)) for text in texts] if videos is not None else None
        image_rows = _deal(images, counts)
        video_rows = _deal(videos, clips, video=True) if clips is not None else [[] for _ in texts]
        rows = []
        for text, row_images, row_videos in zip(texts, image_rows, video_rows, strict=True):
            bos = self.tokenizer.bos_token
            has_bos = bool(bos) and text.startswith(bos)
            row = _Row([], [], bos=options.get("add_special_tokens", True) or has_bos)
            sources, frames = iter(row_images), iter(row_videos)
            for piece in _MEDIA.split(text.removeprefix(bos) if has_bos else text):
                if piece == IMAGE_PLACEHOLDER:
                    _add_image(row, next(sources))
                elif piece == VIDEO_PLACEHOLDER and videos is not None:
                    _add_video(row, next(frames))
                elif piece:
                    row.segments.append(Segment(piece))
            rows.append(row)
        return rows

    # -------------------------------------------------------------------------------------------------------- messages

    def apply_chat_template(
        self,
        conversation: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "auto",
        return_assistant_tokens_mask: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        tools: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Turns messages into text, or with `tokenize=True` into model inputs.

        Tokenising works on the messages, never on rendered text: special tokens and `<image>` inside message text stay
        text, and the ids equal those of `model.chat`. Rendered text (`tokenize=False`) gives no such protection.

        Args:
            conversation: Messages, or a list of conversations. Parts of a user message's content: `{"type": "text"}`,
                `{"type": "image"}` with `image`, `url`, `path` or `base64`, `{"type": "video", "video": [frames]}`.
            chat_template: Another Jinja template; its output is then trusted text.
            add_generation_prompt: End with the assistant header.
            continue_final_message: Leave the last answer open for the model to continue.
            tokenize, return_dict, return_tensors: As in transformers.
            return_assistant_tokens_mask: Also return `assistant_masks`, 1 on answer tokens and their end of turn.
            processor_kwargs: Options as for `__call__`; `images` supplies image parts that carry no source.
            tools: Python functions or JSON schemas that the model may call (`tools_internvl.tool_schemas`). Assistant
                messages may have `tool_calls`, messages of the role `tool` hold results.

        Raises:
            TemplateError: an unknown role or part, or tools on a template whose models know none.
            ImageCountError: `images` does not fit the image parts.
            ValueError: `continue_final_message` and `add_generation_prompt` together.
        """
        if not tokenize or chat_template is not None:
            if tools and chat_template is None:
                chat_template = self._template_for_tools(tools)
            return super().apply_chat_template(
                conversation,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=tokenize,
                return_dict=return_dict,
                return_tensors=return_tensors,
                return_assistant_tokens_mask=return_assistant_tokens_mask,
                processor_kwargs=processor_kwargs,
                tools=tools,
                **kwargs,
            )
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message leaves an answer open, add_generation_prompt begins one: choose.")
        options = {**kwargs, **(processor_kwargs or {})}
        if not options.get("load_audio_from_video"):  # `transformers serve` always says that it wants none
            options.pop("load_audio_from_video", None)
        images = options.pop("images", None)
        if return_tensors != "auto":
            options["return_tensors"] = return_tensors
        single = not conversation or isinstance(conversation[0], dict)
        conversations = [conversation] if single else list(conversation)
        supplied = _supplied_images(images, conversations, single)
        template = get_template(self.template)
        rows = []
        for messages, extra in zip(conversations, supplied, strict=True):
            built = conversation_from_messages(template, messages, self.system_message, add_generation_prompt, tools)
            segments = built.segments()
            if continue_final_message:
                segments = _without_last_end(segments)
            rows.append(_Row(segments, list(_media_of(messages, extra))))
        text_options, image_options = _split_options(options)
        output = self._encode_rows(rows, single, text_options, image_options, return_assistant_tokens_mask)
        return output if return_dict else output["input_ids"]

    def _template_for_tools(self, tools: Sequence[Any]) -> str:
        """The saved Jinja template, or the package's where that one passes tools over in silence."""
        get_conv_template(self.template).describe_tools(tools)  # raises with words
        fresh = _default_chat_template(self.template, self.tokenizer, self.system_message)
        return self.chat_template if "tools" in (self.chat_template or "") else fresh

    # -------------------------------------------------------------------------------------------------------- encoding

    def tokens_per_tile(self, num_tiles: int) -> list[int]:
        """Visual tokens of each of `num_tiles` tiles, as `InternVLChatConfig.tokens_per_tile`."""
        return [self.num_image_token] * num_tiles

    def _encode_rows(
        self,
        rows: list[_Row],
        single: bool,
        text_options: dict[str, Any],
        image_options: dict[str, Any],
        assistant_masks: bool = False,
    ) -> BatchFeature:
        encoder = prompt_encoder(self.tokenizer)
        prompts: list[EncodedPrompt] = []
        tiles: list[torch.Tensor] = []
        patches: list[int] = []
        for row in rows:
            row_tiles, row_patches = self._process_media(row.media, image_options)
            lengths = [sum(self.tokens_per_tile(n)) for n in row_patches]
            encode = encoder.encode_supervised if assistant_masks else encoder.encode
            prompt = encode(row.segments, lengths)
            prompts.append(prompt if row.bos else _without_prefix(prompt, len(encoder.bos)))
            tiles += row_tiles
            patches += row_patches
        data = self._pad(prompts, single, text_options, assistant_masks)
        if tiles:
            data["pixel_values"] = torch.cat(tiles)
            if self.return_num_patches:
                data["num_patches"] = torch.tensor(patches)
        return _as_tensors(data, text_options.get("return_tensors"))

    def _process_media(
        self, media: list[tuple[Any, bool]], options: dict[str, Any]
    ) -> tuple[list[torch.Tensor], list[int]]:
        """Tiles and tile counts of a row's media in order; frames are one tile each."""
        parts: list[torch.Tensor | None] = [None] * len(media)
        for frames in (False, True):
            index = [i for i, (_, is_frame) in enumerate(media) if is_frame == frames]
            if not index:
                continue
            settings = {**options, "dynamic_image_size": False} if frames else options
            output = self.image_processor([media[i][0] for i in index], return_tensors="pt", **settings)
            split = output["pixel_values"].split(output["num_patches"].tolist())
            for i, part in zip(index, split, strict=True):
                parts[i] = part
        return parts, [part.shape[0] for part in parts]

    def _pad(
        self, prompts: list[EncodedPrompt], single: bool, options: dict[str, Any], assistant_masks: bool
    ) -> dict[str, Any]:
        limit = options.get("max_length")
        longest = max(len(prompt.input_ids) for prompt in prompts)
        if limit is not None and longest > limit:
            raise PromptTooLongError(
                f"A prompt has {longest} tokens, more than max_length {limit}. Prompts are not truncated, since that "
                "would cut images: raise max_length or lower max_num."
            )
        data: dict[str, Any] = {"input_ids": [list(prompt.input_ids) for prompt in prompts]}
        data["attention_mask"] = [[1] * len(ids) for ids in data["input_ids"]]
        if assistant_masks:
            data["assistant_masks"] = [[int(on) for on in prompt.supervised] for prompt in prompts]
        padding = options.get("padding", len(prompts) > 1 and options.get("return_tensors") is not None)
        target = limit if padding == "max_length" and limit is not None else longest
        multiple = options.get("pad_to_multiple_of") or 1
        target = -(-target // multiple) * multiple
        if padding not in (False, "do_not_pad", None):
            self._pad_rows(data, target, options.get("padding_side") or "left")
        if single and options.get("return_tensors") is None:
            data = {key: rows[0] for key, rows in data.items()}
        return data

    def _pad_rows(self, data: dict[str, list[list[int]]], length: int, side: str) -> None:
        pad = self.tokenizer.pad_token_id
        if pad is None and any(len(ids) < length for ids in data["input_ids"]):
            raise TokenizerError("The tokenizer has no pad token, which a batch of unequal prompts needs: set one.")
        for key, rows in data.items():
            for row in rows:
                filler = [pad if key == "input_ids" else 0] * (length - len(row))
                row[:] = filler + row if side == "left" else row + filler


def _default_chat_template(template: str, tokenizer: Any, system_message: str | None) -> str | None:
    if tokenizer is None or template not in template_names():
        return None if tokenizer is None else chat_template(get_template(template))  # the latter raises
    encoder = prompt_encoder(tokenizer)
    return chat_template(get_template(template), tokenizer.bos_token if encoder.bos else "", system_message)


def _split_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separates text options from image options; the nested `text_kwargs`, ... of transformers are merged."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        nested = key in ("text_kwargs", "images_kwargs", "videos_kwargs", "common_kwargs")
        flat.update(value or {}) if nested else flat.update({key: value})
    text = {key: flat.pop(key) for key in _TEXT_OPTIONS if key in flat}
    flat = {key: value for key, value in flat.items() if value is not None}
    InternVLImageProcessor(**flat)  # refuses unknown names, also where no image will come by
    return text, flat


def _deal(media: Any, counts: list[int], video: bool = False) -> list[list[Any]]:
    """Assigns media to prompts: given per prompt, or as one list dealt out by the number of placeholders."""
    where = "The text" if len(counts) == 1 else "The batch"
    if media is None:
        media = []
    if not isinstance(media, (list, tuple)):
        media = [media]
    depth = _depth(media) - int(video)
    if depth == 2 and len(media) == len(counts):
        for i, (row, count) in enumerate(zip(media, counts, strict=True)):
            check_image_count(count, len(row or ()), f"Prompt {i}")
        return [list(row or ()) for row in media]
    flat = [item for row in media for item in row or ()] if depth == 2 else list(media)
    if video and depth == 0 and flat:
        flat = [flat]  # a single video as a plain list of frames
    check_image_count(sum(counts), len(flat), where)
    items = iter(flat)
    return [[next(items) for _ in range(count)] for count in counts]


def _depth(media: Any) -> int:
    if not isinstance(media, (list, tuple)):
        return 0
    return 1 + max((_depth(item) for item in media), default=0)


def _add_image(row: _Row, source: Any) -> None:
    row.segments.append(Segment(IMAGE_PLACEHOLDER, "image"))
    row.media.append((source, False))


def _add_video(row: _Row, frames: Sequence[Any]) -> None:
    for i, frame in enumerate(frames):
        row.segments.append(Segment(f"{chr(10) if i else ''}Frame-{i + 1}: "))
        row.segments.append(Segment(IMAGE_PLACEHOLDER, "image"))
        row.media.append((frame, True))


def _supplied_images(images: Any, conversations: list[Any], single: bool) -> list[Iterator[Any] | None]:
    if images is None:
        return [None] * len(conversations)
    images = images if isinstance(images, (list, tuple)) else [images]
    per_row = [images] if single else images
    if single and len(images) == 1 and isinstance(images[0], (list, tuple)):
        per_row = images
    if len(per_row) != len(conversations):
        raise ValueError(f"images has {len(per_row)} rows for {len(conversations)} conversations.")
    for i, (messages, row) in enumerate(zip(conversations, per_row, strict=True)):
        missing = sum(source is None for source, _ in _media_of(messages, None, strict=False))
        check_image_count(missing, len(row), f"Conversation {i}")
    return [iter(row) for row in per_row]


def _media_of(
    messages: Sequence[dict[str, Any]], supplied: Iterator[Any] | None, strict: bool = True
) -> Iterator[tuple[Any, bool]]:
    """Media of a conversation in order, as (source, is a video frame)."""
    for message in messages:
        for part in message.get("content") if isinstance(message.get("content"), (list, tuple)) else ():
            if part.get("type") == "video":
                yield from ((frame, True) for frame in video_frames(part))
            elif part.get("type") in ("image", "image_url"):
                source = _image_source(part)
                if source is None and supplied is not None:
                    source = next(supplied)
                if source is None and strict:
                    raise TemplateError(f"An image part needs one of {_IMAGE_SOURCES}; got keys {sorted(part)}.")
                yield source, False


def _image_source(part: dict[str, Any]) -> Any:
    for key in _IMAGE_SOURCES:
        source = part.get(key)
        if source is not None:
            source = source.get("url") if isinstance(source, dict) else source
            return base64.b64decode(source) if key == "base64" else source
    return None


def _without_last_end(segments: list[Segment]) -> list[Segment]:
    """Drops the end of turn of the last message, which must be an answer."""
    last = max((i for i, segment in enumerate(segments) if segment.kind == "text"), default=-1)
    if last < 0 or not segments[last].supervised:
        raise TemplateError("continue_final_message needs an assistant message with text at the end.")
    return segments[: last + 1]


def _without_prefix(prompt: EncodedPrompt, length: int) -> EncodedPrompt:
    spans = [type(span)(span.kind, span.start - length, span.length) for span in prompt.spans]
    return EncodedPrompt(prompt.input_ids[length:], spans, prompt.supervised[length:])


def _as_tensors(data: dict[str, Any], kind: str | None) -> BatchFeature:
    if kind not in (None, "pt", "np"):
        raise ValueError(f"return_tensors must be 'pt', 'np' or None, got {kind!r}.")
    if kind == "pt":
        data = {key: torch.as_tensor(value) for key, value in data.items()}
    elif kind == "np":
        data = {key: np.asarray(value) for key, value in data.items()}
    return BatchFeature(data)


InternVLProcessor.register_for_auto_class("AutoProcessor")
