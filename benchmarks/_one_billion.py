"""A model with random weights in the proportions of InternVL2.5-1B (InternViT-300M, Qwen2.5-0.5B), and a tokenizer.

Shared by the benchmarks; a share of the layers of both towers keeps each part's share of the compute.
"""

import argparse
import statistics
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from internvl_hub.configuration_internvl_chat import InternVLChatConfig
from internvl_hub.modeling_internvl_chat import InternVLChatModel

IMAGE_SIZE, LAYERS, VOCAB_SIZE = 448, 24, 151674
SPECIAL_TOKENS = ("<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One word `w<id>` for every id, so that any answer of a random model is text that encodes back to its ids."""
    words = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    words |= {f"w{i}": i for i in range(len(words), VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=SPECIAL_TOKENS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<|endoftext|>", eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL_TOKENS[2:]), clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_model(layers: int, device: str, dtype: torch.dtype) -> InternVLChatModel:
    """The model in evaluation mode, `layers` of the 24 layers in each tower."""
    vision = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": layers,
        "image_size": IMAGE_SIZE, "patch_size": 14, "qkv_bias": True, "qk_normalization": False,
        "norm_type": "layer_norm", "initializer_factor": 1.0,
    }  # fmt: skip
    language = {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864,
        "num_attention_heads": 14, "num_key_value_heads": 2, "num_hidden_layers": layers, "vocab_size": VOCAB_SIZE,
        "rope_theta": 1e6, "max_position_embeddings": 32768,
    }  # fmt: skip
    config = InternVLChatConfig(
        vision_config=vision,
        llm_config=language,
        template="internvl2_5",
        img_context_token_id=SPECIAL_TOKENS.index("<IMG_CONTEXT>"),
    )
    torch.manual_seed(0)
    return InternVLChatModel(config).to(device=device, dtype=dtype).eval()


def layers_of(fraction: float) -> int:
    """So many of the 24 layers, at least one."""
    return max(1, round(LAYERS * fraction))


def where(device: str) -> str:
    """What runs it, for the heading of a table."""
    return f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name(device)


def add_model_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Size, device and dtype of the model, and how often the ways take turns."""
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--layers-fraction", type=float, default=0.25, help="share of the layers of both towers")
    parser.add_argument("--full", action="store_true", help="all layers")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))


def ratio(slow: Sequence[float], fast: Sequence[float], digits: int = 2) -> str:
    """The ratio of the medians, with the range of the ratios of single rounds."""
    rounds = [a / b for a, b in zip(slow, fast, strict=True)]
    middle = statistics.median(slow) / statistics.median(fast)
    return f"{middle:.{digits}f}x of medians ({min(rounds):.{digits}f}-{max(rounds):.{digits}f} per round)"
