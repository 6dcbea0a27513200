"""The tiny checkpoint to a Hub on loopback and back, in clean interpreters that have only the Hub or the cache."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from documentation import block_run_by
from hub_server import HubServer
from huggingface_hub import HfApi
from PIL import Image
from publishing_fakes import TOKEN
from safetensors.torch import load_file, save_file

from internvl_hub.modeling_internvl_chat import InternVLChatModel
from internvl_hub.processing_internvl import InternVLProcessor
from internvl_hub.publishing import probe as probing
from internvl_hub.publishing.command import push_main
from internvl_hub.publishing.probe import Output, ProbeError, compare
from internvl_hub.upload_to_hub import push

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "checkpoints" / "internvl-tiny"
QUESTION = "<image>\nWhich number is in the picture?"
LOADED = """
import json, sys
from PIL import Image
from transformers import AutoModel, AutoProcessor
repo, revision, picture = sys.argv[1:]
model = AutoModel.from_pretrained(repo, trust_remote_code=True, revision=revision).eval()
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True, revision=revision)
pixels = processor.image_processor(Image.open(picture), return_tensors="pt")["pixel_values"]
answer = model.chat(processor.tokenizer, pixels, QUESTION, {"max_new_tokens": 12, "do_sample": False})
found = [answer, getattr(type(model), "published", 1), type(model).__module__]
print(json.dumps(found))
""".replace("QUESTION", repr(QUESTION))

NATIVE = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer
repo, *revisions = sys.argv[1:]
found, inputs = {}, load_file("inputs.safetensors")
for revision in revisions:
    model = AutoModelForImageTextToText.from_pretrained(repo, revision=revision, trust_remote_code=False).eval()
    assert type(model).__module__ == "transformers.models.internvl.modeling_internvl"
    tokenizer, ids = AutoTokenizer.from_pretrained(repo, revision=revision), inputs["input_ids"][0].tolist()
    assert tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"] == ids
    with torch.no_grad():
        found[revision] = model(**inputs).logits
save_file(found, "logits.safetensors")
"""


@pytest.fixture(autouse=True)
def _few_parts(hub: HubServer) -> None:
    hub.part_size = 5_000_000  # three parts


@pytest.fixture
def picture() -> Path:
    return next(iter(sorted((ROOT / "examples" / "images").glob("*.png"))))


def _load(revision: str, picture: Path, home: Path, **environment: str) -> list:
    """What a fresh interpreter with a cache in `home` answers: (answer, mark of the code, module)."""
    printed = _fresh_interpreter(LOADED, "user/tiny", revision, str(picture), home=home, **environment)
    return json.loads(printed.splitlines()[-1])


def _fresh_interpreter(code: str, *arguments: str, home: Path, **environment: str) -> str:
    """Runs code without this package in the folder `home / "work"`, with a cache in `home`; returns what it prints."""
    (home / "work").mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    variables = {**kept, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, "-c", f'import sys\nsys.modules["internvl_hub"] = None\n{code}', *arguments]
    done = subprocess.run(command, cwd=home / "work", env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _local_answer(folder: Path, picture: Path) -> str:
    model, processor = InternVLChatModel.from_pretrained(folder).eval(), InternVLProcessor.from_pretrained(folder)
    pixels = processor.image_processor(Image.open(picture), return_tensors="pt")["pixel_values"]
    return model.chat(processor.tokenizer, pixels, QUESTION, {"max_new_tokens": 12, "do_sample": False})


def _second_version(folder: Path) -> tuple[Path, Path]:
    """A checkpoint with other weights, and other code for it."""
    checkpoint, code = folder / "second", folder / "code"
    shutil.copytree(TINY, checkpoint)
    weights = load_file(TINY / "model.safetensors")
    name = next(name for name in weights if name.startswith("mlp1") and name.endswith("weight"))
    weights[name] = -weights[name]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    code.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copyfile(path, code / path.name)
    with (code / "modeling_internvl_chat.py").open("a") as file:
        file.write("\nInternVLChatModel.published = 2\n")
    return checkpoint, code


def test_a_tag_loads_its_code_and_weights_for_good_and_offline(
    hub: HubServer, api: HfApi, picture: Path, tmp_path: Path
) -> None:
    first = push(TINY, "user/tiny", api=api, tag="v1")
    checkpoint, code = _second_version(tmp_path)
    second = push(checkpoint, "user/tiny", api=api, code_root=code)
    assert first.commit != second.commit
    online = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN}
    expected = _local_answer(TINY, picture)
    answer, mark, module = _load("v1", picture, tmp_path / "home", **online)
    assert (answer, mark) == (expected, 1) and first.commit in module
    requests = len(hub.requests)
    offline = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": hub.endpoint}
    assert _load("v1", picture, tmp_path / "home", **offline) == [answer, mark, module]
    assert len(hub.requests) == requests
    answer, mark, module = _load(second.commit, picture, tmp_path / "home", **online)
    assert (answer, mark) == (_local_answer(checkpoint, picture), 2) and second.commit in module


@pytest.mark.newest
def test_the_guide_loads_what_it_published(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    """The block of docs/guide_finetune.md, by somebody who has no installation of ours."""
    push(TINY, "user/stamps", api=api)
    block = block_run_by("tests/publishing/test_round_trip.py", ROOT / "docs" / "guide_finetune.md")
    shown = "\nprint(model.name_or_path, processor.num_image_token)"
    online = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN}
    printed = _fresh_interpreter(block + shown, home=tmp_path / "home", **online)
    assert printed.splitlines()[-1] == "user/stamps 16"


def test_push_loads_back_and_compares(hub: HubServer, api: HfApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert push_main([str(TINY), "user/tiny", "--license", "mit"], api) == 0
    text = capsys.readouterr().out
    commit = hub.repositories["user/tiny"].refs["main"]
    assert f"user/tiny at {commit[:12]} computes the same: 16 greedy tokens, 704 logits, digest " in text
    assert any(path.startswith(f"/user/tiny/resolve/{commit}/model.safetensors") for _, path in hub.requests)


@pytest.mark.newest
def test_other_weights_on_the_hub_are_noticed(
    hub: HubServer, api: HfApi, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Storage that hands out other weights than those that it took."""
    checkpoint, _ = _second_version(tmp_path)
    other = (checkpoint / "model.safetensors").read_bytes()

    def swap() -> None:
        repository_objects = {oid: other for oid, content in hub.objects.items() if len(content) == len(other)}
        hub.objects.update(repository_objects)

    hub.before_commit = swap
    assert push_main([str(TINY), "user/tiny"], api) == 1
    assert "internvl push: user/tiny at " in capsys.readouterr().err


@pytest.mark.newest
def test_native_copy_holds_the_same_weights(
    hub: HubServer, api: HfApi, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert push_main([str(TINY), "user/tiny", "--no-verify", "--native"], api) == 0
    files = hub.files("user/tiny-hf")
    assert json.loads(files["config.json"])["model_type"] == "internvl" and hub.repositories["user/tiny-hf"].private
    assert not any(name.endswith(".py") for name in files) and b"base_model: user/tiny\n" in files["README.md"]
    save = Path(os.environ["HF_MODULES_CACHE"]) / "native.safetensors"
    save.write_bytes(files["model.safetensors"])
    native, own = load_file(save), load_file(TINY / "model.safetensors")
    total = {sum(tensor.double().abs().sum().item() for tensor in each.values()) for each in (native, own)}
    assert max(total) - min(total) < 1e-6 * max(total)


@pytest.mark.newest
def test_native_copy_loads_by_name_and_revision_without_our_code(
    hub: HubServer, api: HfApi, picture: Path, tmp_path: Path
) -> None:
    """transformers' own class in a clean interpreter, on the pixels and ids of the original's processor."""
    other, _ = _second_version(tmp_path)
    assert push_main([str(TINY), "user/tiny", "--no-verify", "--native"], api) == 0
    first = hub.repositories["user/tiny-hf"].refs["main"]
    assert push_main([str(other), "user/tiny", "--no-verify", "--native"], api) == 0
    assert hub.repositories["user/tiny-hf"].refs["main"] != first
    content = [{"type": "image", "image": Image.open(picture)}, {"type": "text", "text": QUESTION[8:]}]
    inputs = InternVLProcessor.from_pretrained(TINY).apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    work = tmp_path / "home" / "work"
    work.mkdir(parents=True)
    save_file(inputs, work / "inputs.safetensors")
    online = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN}
    _fresh_interpreter(NATIVE, "user/tiny-hf", first, "main", home=tmp_path / "home", **online)
    found = load_file(work / "logits.safetensors")
    for revision, checkpoint in ((first, TINY), ("main", other)):
        with torch.no_grad():
            expected = InternVLChatModel.from_pretrained(checkpoint).eval()(**inputs).logits
        torch.testing.assert_close(found[revision], expected, rtol=1e-4, atol=1e-4)
    assert (found[first] - found["main"]).abs().max() > 0.1


def test_dry_run_of_the_command_sends_nothing(hub: HubServer, api: HfApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert push_main([str(TINY), "user/tiny", "--dry-run"], api) == 0
    assert hub.requests == [] and "dry run: nothing was sent" in capsys.readouterr().out


def test_report_on_other_weights_is_refused(
    hub: HubServer, api: HfApi, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    content = {
        "preset": {"title": "T", "name": "t"}, "score": 0.5, "unit": "mean score", "metric": "exact", "error": None,
        "questions": {"scored": 1, "missing": 0}, "settings": {"weights": "0" * 16},
    }  # fmt: skip
    (tmp_path / "report.json").write_text(json.dumps(content))
    assert push_main([str(TINY), "user/tiny", "--eval", str(tmp_path / "report.json")], api) == 1
    assert "reports on other weights" in capsys.readouterr().err and hub.requests == []


# The comparison


def _output(values: list[float], ids: tuple[int, ...] = (1, 2), dtype: str = "float32") -> Output:
    return Output(list(ids), values, dtype, "C")


@pytest.mark.parametrize("dtype", probing.TOLERANCE)
def test_tolerance_follows_the_type_of_the_weights(dtype: str) -> None:
    allowed = probing.TOLERANCE[dtype]
    near, far = (_output([10.0 * (1 - share * allowed), 1.0], dtype=dtype) for share in (0.5, 2))
    assert "of the largest value apart" in compare(near, _output([10.0, 1.0], dtype=dtype), "x")
    with pytest.raises(ProbeError, match="something else"):
        compare(far, _output([10.0, 1.0], dtype=dtype), "x")


@pytest.mark.parametrize("values", [[float("nan"), 1.0], [10.0]])
def test_broken_outputs_never_agree(values: list[float]) -> None:
    with pytest.raises(ProbeError):
        compare(_output(values), _output([10.0, 1.0]), "x")
    with pytest.raises(ProbeError, match=r"answers \[1, 3\]"):
        compare(_output([10.0, 1.0], (1, 3)), _output([10.0, 1.0]), "x")


@pytest.mark.newest
def test_encoder_has_features(tmp_path: Path) -> None:
    """Against the model of the package, on the pixels of the same picture."""
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from internvl_hub.conversion.intern_vit import extract_encoder
    from internvl_hub.modeling_intern_vit import InternVisionModel
    from internvl_hub.upload_to_hub import gather

    encoder = extract_encoder(ROOT / "tests" / "fixtures" / "chat" / "qwen2-internvl2_5", tmp_path / "encoder")
    gather(encoder, tmp_path / "vit")
    found = probing.probe(tmp_path / "vit", "image-feature-extraction")
    image = Image.new("RGB", (96, 96))
    image.putdata([(x * 255 // 96, y * 255 // 96, (x * y) % 256) for y in range(96) for x in range(96)])
    pixels = AutoImageProcessor.from_pretrained(encoder)(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = InternVisionModel.from_pretrained(encoder).eval()(pixels).last_hidden_state
    torch.testing.assert_close(torch.tensor(found.values), features.mean(dim=(0, 1)))
    assert found.ids == [] and found.model_class.startswith("transformers_modules.")
