"""Models of two layers and width 32, and rows for them: what the tests of data, training and invariants share."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedTokenizerFast, set_seed

from internvl_hub.configuration_internvl_chat import InternVLChatConfig
from internvl_hub.data.dataset import ConversationDataset
from internvl_hub.data.records import Message, Record
from internvl_hub.image_processing_internvl import InternVLImageProcessor
from internvl_hub.modeling_internvl_chat import InternVLChatModel

CHAT = Path(__file__).resolve().parents[1] / "fixtures" / "chat"
FOLDERS = {"qwen2": "qwen2-internvl2_5", "internlm2": "internlm2-internlm2_chat"}
IMAGE_SIZE = 28
# Answers of very different length, so that the reductions and the ways to cut a batch disagree if they can.
_ROWS = (
    ("<image>\nWhat is it?", "A cat.", 1), ("Hello!", "Hi, how are you? I am fine, thanks.", 0),
    ("<image>\nand <image>\ndiffer?", "No", 2), ("1+1=?", "2", 0),
    ("<image>\nDescribe.", "Many colours on a plain ground, and nothing else to be seen.", 1),
    ("Name three fruits!", "Apple, pear, plum", 0), ("<image>\nColour?", "Red", 1), ("Bye", "See you", 0),
)  # fmt: skip


class Line(nn.Module):
    """y = w x, as a model of the `Trainer`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": ((self.weight * x - 1) ** 2).mean()}


@cache
def tokenizer(kind: str = "qwen2") -> PreTrainedTokenizerFast:
    """The fixture tokenizer of a family."""
    return PreTrainedTokenizerFast.from_pretrained(CHAT / FOLDERS[kind])


def config(kind: str = "qwen2", **changes: Any) -> InternVLChatConfig:
    """A tiny configuration: tiles of 28 px, 4 visual tokens each, grouped-query attention."""
    vocabulary = tokenizer(kind)
    architecture = {"qwen2": "Qwen2ForCausalLM", "internlm2": "InternLM2ForCausalLM"}[kind]
    text = {
        "architectures": [architecture], "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": len(vocabulary), "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "image_size": IMAGE_SIZE, "patch_size": 7, "norm_type": "layer_norm", "qkv_bias": True,
        "qk_normalization": False,
    }  # fmt: skip
    values = {
        "vision_config": vision, "llm_config": {**text, **changes.pop("llm_config", {})}, "ps_version": "v2",
        "template": {"qwen2": "internvl2_5", "internlm2": "internlm2-chat"}[kind], "dynamic_image_size": True,
        "use_thumbnail": True, "max_dynamic_patch": 4,
        "img_context_token_id": vocabulary.convert_tokens_to_ids("<IMG_CONTEXT>"),
    }  # fmt: skip
    return InternVLChatConfig(**{**values, **changes})


def model(kind: str = "qwen2", seed: int = 0, **changes: Any) -> InternVLChatModel:
    """A fresh model; the same seed gives the same weights."""
    set_seed(seed)
    return InternVLChatModel(config(kind, **changes))


def image_processor() -> InternVLImageProcessor:
    """Tiles of 28 px, four at most and a thumbnail."""
    return InternVLImageProcessor(image_size=IMAGE_SIZE, max_dynamic_patch=4, use_thumbnail=True)


def picture(index: int, size: tuple[int, int] = (56, 28)) -> Image.Image:
    """A small image without two equal pixels in a row."""
    generator = torch.Generator().manual_seed(index)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def records(count: int = 8, with_images: bool = True) -> list[Record]:
    """Short conversations, half of them with one or two pictures."""
    chosen = [row for row in _ROWS if with_images or not row[2]]
    output = []
    for i in range(count):
        question, answer, images = chosen[i % len(chosen)]
        messages = (Message("human", question), Message("gpt", answer))
        output.append(Record(messages, tuple(picture(10 * i + k) for k in range(images)), f"rows:{i + 1}"))
    return output


def dataset(kind: str = "qwen2", count: int = 8, with_images: bool = True) -> ConversationDataset:
    """`records` as a dataset."""
    return ConversationDataset(records(count, with_images), tokenizer(kind), image_processor(), config(kind))
