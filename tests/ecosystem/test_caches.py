"""Key/value caches other than the ordinary one, and compiled decoding, for prompts with images.

Static caches and compilation must change no token. Quantized caches may: eight bits must not on the bundled pictures,
of four only the shape of the answer is checked. Static caches without compilation are in `test_decoding.py`.
"""

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import chat_config
from transformers import CompileConfig
from transformers.cache_utils import QuantizedCache

from internvl_hub.examples.internvl_tiny import evaluate
from internvl_hub.modeling_internvl_chat import InternVLChatModel

GREEDY = {"max_new_tokens": 40, "do_sample": False}
FP8 = {"backend": "fp8"}
EIGHT = {"backend": "hqq", "nbits": 8, "q_group_size": 32, "residual_length": 4, "axis_key": 0, "axis_value": 0}
FOUR = {"backend": "quanto", "nbits": 4, "q_group_size": 32, "residual_length": 4}


def _needs(cache: dict[str, Any]) -> None:
    if cache["backend"] == "fp8":
        if '"fp8"' not in inspect.getsource(QuantizedCache.__init__):
            pytest.skip("this transformers has no fp8 cache")
        return
    try:  # not importorskip: optimum is a namespace that may exist without quanto
        importlib.import_module({"quanto": "optimum.quanto", "hqq": "hqq"}[cache["backend"]])
    except ImportError:
        pytest.skip(f"needs {cache['backend']}")


@pytest.fixture(scope="module")
def parts(root: Path) -> tuple[InternVLChatModel, Any]:
    """The trained tiny model and its processor."""
    model, processor = evaluate.load(root / "checkpoints" / "internvl-tiny")
    return model.eval(), processor


def _questions(root: Path) -> list[tuple[Path, str]]:
    rows = json.loads((root / "examples" / "images" / "questions.json").read_text(encoding="utf-8"))
    return [(root / "examples" / "images" / row["image"], row["turns"][0][0]) for row in rows]


def _inputs(processor: Any, image: Path, question: str) -> dict[str, torch.Tensor]:
    content = [{"type": "image", "path": str(image)}, {"type": "text", "text": question}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    return processor.apply_chat_template([{"role": "user", "content": content}], **options)


# ------------------------------------------------------------------------------------------------------ quantized


@pytest.mark.parametrize("cache", [FP8, EIGHT], ids=["fp8", "hqq-8bit"])
def test_eight_bit_cache_changes_no_answer(cache: dict[str, Any], parts: tuple[Any, Any], root: Path) -> None:
    _needs(cache)
    model, processor = parts
    before = dict(cache)
    for image, question in _questions(root)[:4]:
        inputs = _inputs(processor, image, question)
        made = model.generate(
            **inputs, **GREEDY, cache_implementation="quantized", cache_config=cache, return_dict_in_generate=True
        )
        assert isinstance(made.past_key_values, QuantizedCache)
        assert torch.equal(made.sequences, model.generate(**inputs, **GREEDY))
        assert cache == before, "the caller's dictionary is left alone"


@pytest.mark.parametrize("cache", [FP8, EIGHT, FOUR], ids=["fp8", "hqq-8bit", "quanto-4bit"])
def test_quantized_cache_is_near_the_ordinary_one(cache: dict[str, Any], parts: tuple[Any, Any], root: Path) -> None:
    """Logits of the second token: the first comes from the prompt alone, before anything is read back."""
    _needs(cache)
    model, processor = parts
    inputs = _inputs(
        processor, root / "examples" / "images" / "shapes.png", "Where is the <ref>orange triangle</ref>?"
    )
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(**inputs, **options).logits
    found = model.generate(**inputs, **options, cache_implementation="quantized", cache_config=cache).logits
    assert torch.equal(found[0], plain[0])
    error = ((found[1] - plain[1]).norm() / plain[1].norm()).item()
    assert 0 < error < (0.3 if cache is FOUR else 0.05)


@pytest.mark.parametrize("kind", ["quantized", "static"])
def test_session_with_another_cache_keeps_the_features_alone(kind: str, parts: tuple[Any, Any], root: Path) -> None:
    """Right answers, images encoded once, and the session says that it reused no prompt."""
    options: dict[str, Any] = {**GREEDY, "cache_implementation": kind}
    if kind == "quantized":
        _needs(FP8)
        options["cache_config"] = FP8
    model, processor = parts
    image, question = _questions(root)[0]
    pixels = processor.image_processor(image)["pixel_values"]
    session, history, expected = model.new_session(), None, None
    for turn, text in enumerate((f"<image>\n{question}", "Is there a circle?")):
        answer, history = model.chat(
            processor.tokenizer, pixels, text, options, history=history, return_history=True, session=session
        )
        expected, _ = model.chat(
            processor.tokenizer, pixels, text, options, history=history[:turn], return_history=True
        )
        assert answer == expected
        assert session.reused_tokens == 0 and session.encoded_images == 1 - turn


# ------------------------------------------------------------------------------------------------------- compiled


def _compilation(graphs: list[Any], all_devices: bool = True) -> CompileConfig:
    """Every graph goes into the list and runs as it is."""

    def keep(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:  # a function, which transformers does not copy
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(backend=keep, fullgraph=True, dynamic=False, mode=None)
    config._compile_all_devices = all_devices
    return config


def test_compiled_decoding_changes_no_answer(root: Path) -> None:
    """One graph, compiled once for every step and for a second image; the prompt is not compiled."""
    torch.manual_seed(3)
    model = InternVLChatModel(chat_config()).eval()
    model.generation_config.eos_token_id = None
    graphs: list[Any] = []
    options = {"max_new_tokens": 12, "do_sample": False}
    compiled = {**options, "cache_implementation": "static", "compile_config": _compilation(graphs)}
    try:
        for seed in (4, 5):
            generator = torch.Generator().manual_seed(seed)
            ids = torch.tensor([[1, 20, 11, 11, 11, 11, 30, 40, 50]])
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            inputs["pixel_values"] = torch.randn(1, 3, 56, 56, generator=generator)
            expected = model.generate(**inputs, **options)
            assert torch.equal(model.generate(**inputs, **compiled), expected)
            assert len(graphs) == 1
    finally:
        torch._dynamo.reset()


def test_nothing_is_compiled_on_a_cpu_unasked() -> None:
    """transformers compiles by itself on accelerators alone."""
    model = InternVLChatModel(chat_config()).eval()
    graphs: list[Any] = []
    config = _compilation(graphs, all_devices=False)
    ids = torch.tensor([[1, 20, 30, 40]])
    model.generate(ids, max_new_tokens=3, do_sample=False, cache_implementation="static", compile_config=config)
    assert graphs == []
