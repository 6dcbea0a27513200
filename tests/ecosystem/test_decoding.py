"""What transformers' `generate` offers, on the trained tiny checkpoint loaded as remote code.

Every way of decoding greedily must give what plain greedy decoding gives; scores are compared with one forward pass
over the finished sequence. Beams, static caches and sampling against the bare language model are in
`test_generation_internvl_chat.py` and `test_sampling_internvl.py`, the pipeline in `test_processing_internvl.py`.
"""

import copy
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    LogitsProcessor,
    TextIteratorStreamer,
)

from internvl_hub.upload_to_hub import gather

GREEDY = {"max_new_tokens": 40, "do_sample": False}


@pytest.fixture(scope="module")
def folder(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with its code."""
    path = tmp_path_factory.mktemp("hub") / "internvl-tiny"
    gather(root / "checkpoints" / "internvl-tiny", path)
    return path


@pytest.fixture(scope="module")
def parts(folder: Path) -> tuple[Any, Any]:
    """Model and processor, of classes that lie in the folder."""
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules.")
    return model, AutoProcessor.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="module")
def model(parts: tuple[Any, Any]) -> Any:
    """The model."""
    return parts[0]


@pytest.fixture(scope="module")
def asked(parts: tuple[Any, Any], root: Path) -> dict[str, torch.Tensor]:
    """A question with a long answer, as inputs of `generate`."""
    return _inputs(parts[1], root / "examples" / "images" / "shapes.png", "Where is the <ref>orange triangle</ref>?")


@pytest.fixture(scope="module")
def greedy(model: Any, asked: dict[str, torch.Tensor]) -> torch.Tensor:
    """Ids of prompt and answer."""
    ids = model.generate(**asked, **GREEDY)
    assert ids.shape[1] - asked["input_ids"].shape[1] > 15
    return ids


def _inputs(processor: Any, image: Path, question: str) -> dict[str, torch.Tensor]:
    content = [{"type": "image", "path": str(image)}, {"type": "text", "text": question}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    return processor.apply_chat_template([{"role": "user", "content": content}], **options)


def _shallow(model: Any) -> Any:
    """The model without the upper half of its decoder layers: a draft that is right only now and then."""
    config = copy.deepcopy(model.config)
    config.llm_config.num_hidden_layers = 2
    config.llm_config.layer_types = config.llm_config.layer_types[:2]
    draft = type(model)(config).eval()
    weights = model.state_dict()
    draft.load_state_dict({name: weights[name] for name in draft.state_dict()})
    return draft


# ----------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("way", ["itself", "shallow", "text", "lookup"])
def test_assisted_decoding_changes_no_answer(way: str, model: Any, asked: dict, greedy: torch.Tensor) -> None:
    """Draft models that see the image, one that does not, and n-grams of the prompt."""
    passes: list[int] = []
    drafts = {"itself": lambda: copy.deepcopy(model), "shallow": lambda: _shallow(model)}
    drafts["text"] = lambda: _shallow(model).language_model
    options = {"prompt_lookup_num_tokens": 4} if way == "lookup" else {"assistant_model": drafts[way]()}
    handle = model.language_model.register_forward_pre_hook(lambda *_: passes.append(1))  # not on a copy
    try:
        assert torch.equal(model.generate(**asked, **GREEDY, **options), greedy)
    finally:
        handle.remove()
    new = greedy.shape[1] - asked["input_ids"].shape[1]
    if way == "itself":  # a draft that sees what the model sees is always right
        assert len(passes) <= new / 2


def test_assisted_decoding_of_ready_features(model: Any, asked: dict, greedy: torch.Tensor) -> None:
    features = model.extract_feature(asked["pixel_values"]).detach()
    plain = {name: asked[name] for name in ("input_ids", "attention_mask")}
    output = model.generate(**plain, visual_features=features, **GREEDY, prompt_lookup_num_tokens=3)
    assert torch.equal(output, greedy)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_caches_change_no_answer(kind: str, model: Any, asked: dict, greedy: torch.Tensor) -> None:
    assert torch.equal(model.generate(**asked, **GREEDY, cache_implementation=kind), greedy)


def test_forward_is_one_graph(model: Any, asked: dict) -> None:
    """No graph break with an image; numbers are those of the same graph run step by step."""
    inputs = {name: asked[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")(**inputs).logits
        torch.testing.assert_close(compiled, model(**inputs).logits)
    torch._dynamo.reset()


def test_scores_are_those_of_one_forward_pass(model: Any, asked: dict, greedy: torch.Tensor) -> None:
    asks = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    output = model.generate(**asked, **GREEDY, **asks)
    assert torch.equal(output.sequences, greedy)
    length = asked["input_ids"].shape[1]
    with torch.no_grad():
        logits = model(input_ids=greedy, pixel_values=asked["pixel_values"]).logits[:, length - 1 : -1]
    torch.testing.assert_close(torch.stack(output.logits, dim=1), logits, rtol=1e-3, atol=1e-3)
    expected = logits.log_softmax(-1).gather(-1, greedy[:, length:, None]).squeeze(-1)
    scores = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-3)


class Without(LogitsProcessor):
    """Forbids one token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, torch.tensor([self.token]), -torch.inf)


def test_logits_processor_and_beams(model: Any, asked: dict, greedy: torch.Tensor) -> None:
    length = asked["input_ids"].shape[1]
    token = int(greedy[0, length])
    other = model.generate(**asked, **GREEDY, logits_processor=[Without(token)])
    assert token not in other[0, length:].tolist()
    beams = {"num_beams": 3, "length_penalty": 0.0, "return_dict_in_generate": True, "output_scores": True}
    best = model.generate(**asked, **GREEDY, **beams)
    with torch.no_grad():
        logits = model(input_ids=best.sequences, pixel_values=asked["pixel_values"]).logits[:, length - 1 : -1]
    total = logits.log_softmax(-1).gather(-1, best.sequences[:, length:, None]).sum()
    torch.testing.assert_close(best.sequences_scores[0], total, rtol=1e-3, atol=1e-3)


def test_text_iterator_streamer(parts: tuple[Any, Any], asked: dict, greedy: torch.Tensor) -> None:
    model, processor = parts
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    thread = threading.Thread(target=model.generate, kwargs={**asked, **GREEDY, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert len([piece for piece in pieces if piece]) > 3
    assert "".join(pieces) == processor.tokenizer.decode(greedy[0, asked["input_ids"].shape[1] :])


# ------------------------------------------------------------------------------------------------------ loading, peft


def test_offloaded_model_answers_right(folder: Path, parts: tuple[Any, Any], root: Path, tmp_path: Path) -> None:
    """Encoder on the disk, the rest in memory; the right answer is in the examples' own file."""
    map_ = {"vision_model": "disk", "mlp1": "cpu", "language_model": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, device_map=map_, offload_folder=tmp_path
    ).eval()
    assert next(model.vision_model.parameters()).device.type == "meta"
    row = json.loads((root / "examples" / "images" / "questions.json").read_text(encoding="utf-8"))[0]
    question, answer = row["turns"][0]
    inputs = _inputs(parts[1], root / "examples" / "images" / row["image"], question)
    output = model.generate(**inputs, **GREEDY)
    text = parts[1].tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == answer


def _adapter(model: Any, path: Path, seed: int) -> torch.Tensor:
    """Saves a random adapter; returns logits of one text with it merged by hand, W + B A * alpha / r."""
    torch.manual_seed(seed)
    settings = LoraConfig(r=2, lora_alpha=4, target_modules=r"language_model.*\.(q|v)_proj", init_lora_weights=False)
    get_peft_model(copy.deepcopy(model), settings).save_pretrained(path)
    merged, text = copy.deepcopy(model), torch.tensor([[6, 7, 8, 9]])
    from safetensors.torch import load_file

    weights = load_file(path / "adapter_model.safetensors")
    with torch.no_grad():
        for name, a in weights.items():
            if name.endswith("lora_A.weight"):
                layer = merged.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
                layer.weight += 2 * weights[name.replace("lora_A", "lora_B")] @ a
        return merged(input_ids=text).logits


def test_adapters_are_swapped_while_loaded(model: Any, tmp_path: Path) -> None:
    """`load_adapter`, `set_adapter`, `disable_adapters` of transformers, and peft's own model."""
    text = torch.tensor([[6, 7, 8, 9]])
    wanted = {name: _adapter(model, tmp_path / name, seed) for seed, name in enumerate(("first", "second"))}
    host = copy.deepcopy(model)
    with torch.no_grad():
        plain = host(input_ids=text).logits
        assert (wanted["first"] - wanted["second"]).abs().max() > 0.1 and (wanted["first"] - plain).abs().max() > 0.1
        for name in wanted:
            host.load_adapter(str(tmp_path / name), adapter_name=name)
        for name in ("first", "second", "first"):
            host.set_adapter(name)
            torch.testing.assert_close(host(input_ids=text).logits, wanted[name], rtol=1e-3, atol=1e-3)
        host.disable_adapters()
        torch.testing.assert_close(host(input_ids=text).logits, plain)
        wrapped = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "first", adapter_name="first").eval()
        wrapped.load_adapter(str(tmp_path / "second"), "second")
        for name in ("second", "first"):
            wrapped.set_adapter(name)
            torch.testing.assert_close(wrapped(input_ids=text).logits, wanted[name], rtol=1e-3, atol=1e-3)
