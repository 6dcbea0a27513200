"""Gathering, checking and publishing a checkpoint: what travels, what never does, and what is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save, save_file
from versions import runnable

from internvl_hub import upload_to_hub as upload
from internvl_hub.conversion.intern_vit import extract_encoder
from internvl_hub.image_processing_internvl import InternVLImageProcessor
from internvl_hub.modeling_internvl_chat import InternVLChatModel
from internvl_hub.publishing.hub import Published
from internvl_hub.upload_to_hub import CheckpointError, HubCodeError, LayoutError, VerificationError, gather, push

ROOT = Path(__file__).resolve().parents[1]
CHAT = ROOT / "tests" / "fixtures" / "chat"
CODE = {
    "configuration_internvl_chat.py": "from .shared import x\n\n\nclass InternVLChatConfig: ...\n",
    "modeling_internvl_chat.py": "from .configuration_internvl_chat import InternVLChatConfig\nfrom .deep import y\n",
    "processing_internvl.py": "",
    "image_processing_internvl.py": "",
    "shared.py": "x = 1\n",
    "deep.py": "y = 'é'\n",
    "unrelated.py": "",
}
CLOSURE = set(CODE) - {"unrelated.py"}
DATA = {"config.json", "processor_config.json", "model.safetensors", "tokenizer.json", "README.md"}


def _write(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def code_root(tmp_path: Path) -> Path:
    return _write(tmp_path / "code", CODE)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = {"model_type": "internvl_chat", "force_image_size": 56, "template": "internvl2_5"}
    files = {
        "config.json": json.dumps(config),
        "processor_config.json": "{}",
        "model.safetensors": _weights("weights"),
        "tokenizer.json": "{}",
    }
    return _write(tmp_path / "checkpoint", files)


def _weights(text: str, names: str = "a") -> str:
    """A safetensors file whose tensors hold the bytes of a text; of seven it has 71."""
    return save({name: torch.tensor(list(text.encode()), dtype=torch.uint8) for name in names}).decode()


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {upload.MARKER}


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


# What travels


def test_gathers_data_and_the_closure(checkpoint: Path, code_root: Path, tmp_path: Path) -> None:
    files = gather(checkpoint, tmp_path / "out", code_root=code_root)
    assert _names(tmp_path / "out") == {path.name for path in files} == CLOSURE | DATA
    for name in CLOSURE:
        assert (tmp_path / "out" / name).read_bytes() == (code_root / name).read_bytes()
    assert (tmp_path / "out" / "model.safetensors").samefile(checkpoint / "model.safetensors")


def test_only_allowed_files_travel(checkpoint: Path, code_root: Path, tmp_path: Path) -> None:
    allowed = {"merges.txt", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "LICENSE"}
    private = [
        "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin", "trainer_state.json",
        "events.out.tfevents.1", ".env", ".git/config", "__pycache__/a.pyc", "notes.txt", "global_step1/states.pt",
        "modeling_internvl_chat.py", "adapter_model.safetensors", "optimizer.safetensors", "cookies.json",
    ]  # fmt: skip
    _write(checkpoint, dict.fromkeys([*allowed, *private], "{}"))
    gather(checkpoint, tmp_path / "out", code_root=code_root)
    assert _names(tmp_path / "out") == CLOSURE | DATA | allowed
    assert (tmp_path / "out" / "modeling_internvl_chat.py").read_text() == CODE["modeling_internvl_chat.py"]


def test_shards_travel_with_their_index(checkpoint: Path, code_root: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    shards = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    index = json.dumps({"weight_map": dict(zip("abc", sorted(shards) * 2, strict=False))})
    stale = {"model-00001-of-00003.safetensors": ""}
    shards_of = dict(zip(sorted(shards), (_weights("w", "ac"), _weights("w", "b")), strict=True))
    _write(checkpoint, {**shards_of, **stale, "model.safetensors.index.json": index})
    gather(checkpoint, tmp_path / "out", code_root=code_root)
    weights = {name for name in _names(tmp_path / "out") if "safetensors" in name}
    assert weights == shards | {"model.safetensors.index.json"}


def test_weights_are_copied_where_links_fail(
    checkpoint: Path, code_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", fail)
    gather(checkpoint, tmp_path / "out", code_root=code_root)
    copy = tmp_path / "out" / "model.safetensors"
    assert copy.read_text() == _weights("weights") and not copy.samefile(checkpoint / "model.safetensors")


def test_checkpoint_is_left_alone(checkpoint: Path, code_root: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    gather(checkpoint, tmp_path / "out", code_root=code_root)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_code_of_a_custom_tokenizer_travels(checkpoint: Path, code_root: Path, tmp_path: Path) -> None:
    auto_map = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    _write(checkpoint, {"tokenizer_config.json": json.dumps({"auto_map": auto_map}), "tokenization_own.py": "z = 1\n"})
    gather(checkpoint, tmp_path / "out", code_root=code_root)
    assert (tmp_path / "out" / "tokenization_own.py").read_text() == "z = 1\n"
    (checkpoint / "tokenization_own.py").unlink()
    with pytest.raises(HubCodeError, match="tokenization_own.py"):
        gather(checkpoint, tmp_path / "other", code_root=code_root)


def test_tokenizer_of_another_repository_gives_way_where_its_code_is_here(
    checkpoint: Path, code_root: Path, tmp_path: Path
) -> None:
    auto_map = {"AutoTokenizer": ["a/b--tokenization_own.OwnTokenizer", None], "AutoOther": "a/b--absent.Other"}
    files = {"tokenizer_config.json": json.dumps({"auto_map": auto_map}), "tokenization_own.py": "z = 1\n"}
    _write(checkpoint, files)
    gather(checkpoint, tmp_path / "own", code_root=code_root)
    expected = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None], "AutoOther": "a/b--absent.Other"}
    assert _json(tmp_path / "own" / "tokenizer_config.json")["auto_map"] == expected
    assert (tmp_path / "own" / "tokenization_own.py").read_text() == "z = 1\n"
    (checkpoint / "tokenization_own.py").unlink()
    gather(checkpoint, tmp_path / "foreign", code_root=code_root)
    assert _json(tmp_path / "foreign" / "tokenizer_config.json")["auto_map"] == auto_map


# Configuration


def test_auto_map_is_completed(checkpoint: Path, code_root: Path, tmp_path: Path) -> None:
    gather(checkpoint, tmp_path / "out", code_root=code_root)
    config = _json(tmp_path / "out" / "config.json")
    assert config.pop("auto_map") == upload.AUTO_MAP
    assert config == _json(checkpoint / "config.json")


def test_references_into_other_repositories_give_way(checkpoint: Path, code_root: Path, tmp_path: Path) -> None:
    own = {
        "AutoConfig": "someone/else--configuration_internvl_chat.InternVLChatConfig",
        "AutoModel": "deep.Other",
        "AutoModelForVision2Seq": "shared.Another",
    }
    _write(checkpoint, {"config.json": json.dumps({"model_type": "internvl_chat", "auto_map": own})})
    gather(checkpoint, tmp_path / "out", code_root=code_root)
    expected = {**upload.AUTO_MAP, "AutoModel": "deep.Other", "AutoModelForVision2Seq": "shared.Another"}
    assert _json(tmp_path / "out" / "config.json")["auto_map"] == expected


def test_processor_config_names_both_classes(checkpoint: Path, code_root: Path, tmp_path: Path) -> None:
    gather(checkpoint, tmp_path / "out", code_root=code_root)
    config = _json(tmp_path / "out" / "processor_config.json")
    assert config["auto_map"]["AutoProcessor"] == upload.PROCESSOR
    assert config["image_processor"]["auto_map"]["AutoImageProcessor"] == upload.IMAGE_PROCESSOR


def test_processor_config_keeps_what_was_saved(checkpoint: Path, code_root: Path, tmp_path: Path) -> None:
    saved = {"extra": 3, "image_processor": {"max_dynamic_patch": 5, "auto_map": {"AutoImageProcessor": "u/n--a.B"}}}
    _write(checkpoint, {"processor_config.json": json.dumps(saved)})
    gather(checkpoint, tmp_path / "out", code_root=code_root)
    config = _json(tmp_path / "out" / "processor_config.json")
    assert config["extra"] == 3
    assert config["image_processor"]["max_dynamic_patch"] == 5
    assert config["image_processor"]["auto_map"] == {"AutoImageProcessor": upload.IMAGE_PROCESSOR}


def test_where_it_was_loaded_from_is_not_told(checkpoint: Path, code_root: Path, tmp_path: Path) -> None:
    places = {"_name_or_path": "/home/alice/x", "name_or_path": "alice/x"}
    config = {**_json(checkpoint / "config.json"), **places, "llm_config": {**places, "hidden_size": 8}, "x": [places]}
    files = {
        "config.json": config, "tokenizer_config.json": {**places, "kept": 1}, "generation_config.json": places,
        "processor_config.json": {"image_processor": places}, "preprocessor_config.json": places,
    }  # fmt: skip
    _write(checkpoint, {name: json.dumps(values) for name, values in files.items()})
    gather(checkpoint, tmp_path / "out", code_root=code_root)
    assert all("alice" not in (tmp_path / "out" / name).read_text() for name in files)
    published = _json(tmp_path / "out" / "config.json")
    assert (published["llm_config"], published["x"]) == ({"hidden_size": 8}, [{}])
    assert _json(tmp_path / "out" / "tokenizer_config.json") == {"kept": 1}


# Model card


def test_model_card_holds_metadata_and_usage(checkpoint: Path, code_root: Path, tmp_path: Path) -> None:
    card = {"repo_id": "user/name", "license": "mit", "base_model": "user/base"}
    gather(checkpoint, tmp_path / "out", code_root=code_root, **card)
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for line in ["library_name: transformers", "pipeline_tag: image-text-to-text", "- custom_code", "license: mit"]:
        assert line in text
    assert "base_model: user/base" in text and 'from_pretrained("user/name"' in text


def test_own_model_card_is_kept(checkpoint: Path, code_root: Path, tmp_path: Path) -> None:
    _write(checkpoint, {"README.md": "mine"})
    gather(checkpoint, tmp_path / "out", code_root=code_root)
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


# What is refused


@pytest.mark.parametrize(
    "reference", ["/tmp/secret.X", "../secret.X", "sub/secret.X", "secret", "a/b--secret.X", 3, ["x"]]
)
def test_auto_map_cannot_name_files_elsewhere(
    checkpoint: Path, code_root: Path, tmp_path: Path, reference: object
) -> None:
    """Any Python file of the user's disk could be published by a checkpoint that somebody else wrote."""
    for folder in (tmp_path, code_root / "sub"):
        _write(folder, {"secret.py": "PASSWORD = 1\n"})
    if reference == "/tmp/secret.X":
        reference = f"{tmp_path}/secret.X"
    config = {"model_type": "internvl_chat", "auto_map": {"AutoModelForVision2Seq": reference}}
    _write(checkpoint, {"config.json": json.dumps(config)})
    with pytest.raises(LayoutError, match=f"auto_map names {re.escape(repr(reference))}: write file.Class"):
        gather(checkpoint, tmp_path / "out", code_root=code_root)


@pytest.mark.parametrize("reference", ["{folder}/secret.X", "../secret.X", 3])
def test_tokenizer_cannot_name_files_elsewhere(
    checkpoint: Path, code_root: Path, tmp_path: Path, reference: object
) -> None:
    _write(tmp_path, {"secret.py": "PASSWORD = 1\n"})
    reference = reference.format(folder=tmp_path) if isinstance(reference, str) else reference
    _write(checkpoint, {"tokenizer_config.json": json.dumps({"auto_map": {"AutoTokenizer": [reference, None]}})})
    with pytest.raises(LayoutError, match="write file.Class"):
        gather(checkpoint, tmp_path / "out", code_root=code_root)


def test_entry_that_is_no_text_gives_way(checkpoint: Path, code_root: Path, tmp_path: Path) -> None:
    config = {"model_type": "internvl_chat", "auto_map": {"AutoModel": None, "AutoConfig": "../secret.X"}}
    _write(checkpoint, {"config.json": json.dumps(config)})
    gather(checkpoint, tmp_path / "out", code_root=code_root)
    assert _json(tmp_path / "out" / "config.json")["auto_map"] == upload.AUTO_MAP


@pytest.mark.parametrize("code", [b"def (", b"# caf\xe9", b"x = 1\x00"], ids=range(3))
def test_code_that_is_no_python(checkpoint: Path, code_root: Path, tmp_path: Path, code: bytes) -> None:
    _write(checkpoint, {"tokenizer_config.json": json.dumps({"auto_map": {"AutoTokenizer": "own.Own"}})})
    (checkpoint / "own.py").write_bytes(code)
    with pytest.raises(HubCodeError, match="own.py cannot be read as Python"):
        gather(checkpoint, tmp_path / "out", code_root=code_root)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda whole: whole[: len(whole) // 2], "its beginning is lost"),
        (lambda whole: whole[:-1], "it has 70 bytes and should have 71"),
        (lambda whole: whole + b"0", "it has 72 bytes and should have 71"),
        (lambda whole: b"", "its beginning is lost"),
        (lambda whole: b"<html>Not found</html>", "is no safetensors file"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (lambda whole: whole.replace(b'"a"', b'"a '), "not valid JSON"),
        (lambda whole: whole.replace(b"data_offsets", b"data_offsetz"), "lacks the place of a tensor"),
        (lambda whole: whole.replace(b"[0,7]", b"[1,7]"), "overlap or leave gaps"),
        (lambda whole: save({}), "has no tensors"),
        (lambda whole: (8).to_bytes(8, "little") + b"[1]     ", "holds a list"),
    ],
    ids=range(11),
)
def test_damaged_weights(checkpoint: Path, code_root: Path, tmp_path: Path, damage: Any, message: str) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(LayoutError, match=message):
        gather(checkpoint, tmp_path / "out", code_root=code_root)


@pytest.mark.parametrize("names", ["a", "abc", "xy"])
def test_index_that_does_not_fit(checkpoint: Path, code_root: Path, tmp_path: Path, names: str) -> None:
    (checkpoint / "model.safetensors").unlink()
    shard = "model-00001-of-00001.safetensors"
    index = json.dumps({"weight_map": dict.fromkeys(names, shard)})
    _write(checkpoint, {shard: _weights("w", "ab"), "model.safetensors.index.json": index})
    with pytest.raises(LayoutError, match="and its shards disagree on"):
        gather(checkpoint, tmp_path / "out", code_root=code_root)


@pytest.mark.parametrize(
    ("missing", "error", "message"),
    [
        ("config.json", CheckpointError, "has no config.json"),
        ("model.safetensors", CheckpointError, "looked for model.safetensors and model.safetensors.index.json"),
        ("tokenizer.json", CheckpointError, "no tokenizer: looked for tokenizer.json"),
    ],
)
def test_missing_files(
    checkpoint: Path, code_root: Path, tmp_path: Path, missing: str, error: type[Exception], message: str
) -> None:
    (checkpoint / missing).unlink()
    with pytest.raises(error, match=message):
        gather(checkpoint, tmp_path / "out", code_root=code_root)


def test_missing_folder(code_root: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        gather(tmp_path / "absent", tmp_path / "out", code_root=code_root)


@pytest.mark.parametrize(
    ("file", "hint"), [("pytorch_model.bin", "Pickled"), ("adapter_model.safetensors", "merge that into its base")]
)
def test_other_weights_get_a_hint(checkpoint: Path, code_root: Path, tmp_path: Path, file: str, hint: str) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / file)
    with pytest.raises(CheckpointError, match=hint):
        gather(checkpoint, tmp_path / "out", code_root=code_root)


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({"config.json": "{"}, LayoutError, "not valid JSON"),
        ({"config.json": "[]"}, LayoutError, "not an object"),
        ({"config.json": '{"model_type": ["internvl_chat"]}'}, LayoutError, "model_type="),
        (
            {"config.json": '{"model_type": "internvl_chat", "auto_map": ["x"]}'},
            LayoutError,
            "auto_map in config.json",
        ),
        ({"config.json": "[" * 100_000}, LayoutError, "not valid JSON"),
        (
            {"config.json": f'{{"model_type": "internvl_chat", "x": {"[" * 700}{"]" * 700}}}'},
            LayoutError,
            "nested too deeply",
        ),
        ({"processor_config.json": '{"image_processor": [1]}'}, LayoutError, "image_processor in processor_config"),
        ({"config.json": '{"model_type": "internvl"}'}, LayoutError, "model_type='internvl'"),
        ({"model.safetensors.index.json": "{}"}, LayoutError, "remove the stale one"),
        (
            {"config.json": '{"model_type": "internvl_chat", "auto_map": {"AutoBackbone": "absent.Class"}}'},
            HubCodeError,
            "absent.py, which auto_map names",
        ),
    ],
)
def test_unusable_files(
    checkpoint: Path, code_root: Path, tmp_path: Path, files: dict[str, str], error: type[Exception], message: str
) -> None:
    _write(checkpoint, files)
    with pytest.raises(error, match=message):
        gather(checkpoint, tmp_path / "out", code_root=code_root)


@pytest.mark.parametrize(
    ("shard", "error"), [("model-00001-of-00001.safetensors", CheckpointError), ("../secret.safetensors", LayoutError)]
)
def test_bad_shard_names(
    checkpoint: Path, code_root: Path, tmp_path: Path, shard: str, error: type[Exception]
) -> None:
    (checkpoint / "model.safetensors").unlink()
    (tmp_path / "secret.safetensors").touch()
    _write(checkpoint, {"model.safetensors.index.json": json.dumps({"weight_map": {"a": shard}})})
    with pytest.raises(error, match=re.escape(shard)):
        gather(checkpoint, tmp_path / "out", code_root=code_root)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": null}', '{"weight_map": [1]}', '{"weight_map": {"a": 3}}'])
def test_index_without_names_of_files(checkpoint: Path, code_root: Path, tmp_path: Path, index: str) -> None:
    (checkpoint / "model.safetensors").unlink()
    _write(checkpoint, {"model.safetensors.index.json": index})
    with pytest.raises(LayoutError, match="has no weight_map"):
        gather(checkpoint, tmp_path / "out", code_root=code_root)


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "config.json", "processor_config.json"])
def test_links_out_of_the_checkpoint_are_refused(checkpoint: Path, code_root: Path, tmp_path: Path, name: str) -> None:
    (checkpoint / name).rename(tmp_path / "elsewhere")
    (checkpoint / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LayoutError, match="outside the checkpoint"):
        gather(checkpoint, tmp_path / "out", code_root=code_root)


def test_code_behind_a_link_out_of_the_checkpoint_is_refused(
    checkpoint: Path, code_root: Path, tmp_path: Path
) -> None:
    _write(checkpoint, {"tokenizer_config.json": json.dumps({"auto_map": {"AutoTokenizer": "tokenization_own.Own"}})})
    (tmp_path / "elsewhere.py").write_text("secret = 1\n")
    (checkpoint / "tokenization_own.py").symlink_to(tmp_path / "elsewhere.py")
    with pytest.raises(LayoutError, match="outside the checkpoint"):
        gather(checkpoint, tmp_path / "out", code_root=code_root)


def test_snapshot_of_the_hub_cache_is_followed(checkpoint: Path, code_root: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    checkpoint.rename(blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    gather(snapshot, tmp_path / "out", code_root=code_root)
    weights = tmp_path / "out" / "model.safetensors"
    assert weights.read_text() == _weights("weights") and not weights.is_symlink()


# The target folder


def test_failure_leaves_nothing(checkpoint: Path, code_root: Path, tmp_path: Path) -> None:
    (code_root / "deep.py").unlink()
    with pytest.raises(HubCodeError):
        gather(checkpoint, tmp_path / "parent" / "out", code_root=code_root)
    assert list((tmp_path / "parent").iterdir()) == []


def test_failure_keeps_the_earlier_folder(checkpoint: Path, code_root: Path, tmp_path: Path) -> None:
    gather(checkpoint, tmp_path / "parent" / "out", code_root=code_root)
    before = _names(tmp_path / "parent" / "out")
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError):
        gather(checkpoint, tmp_path / "parent" / "out", code_root=code_root, overwrite=True)
    assert _names(tmp_path / "parent" / "out") == before
    assert [path.name for path in (tmp_path / "parent").iterdir()] == ["out"]


def test_overwriting_replaces_only_its_own_folder(checkpoint: Path, code_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # empty: fine
    gather(checkpoint, out, code_root=code_root)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        gather(checkpoint, out, code_root=code_root)
    (code_root / "deep.py").write_text("y = 2\n")
    gather(checkpoint, out, code_root=code_root, overwrite=True)
    assert (out / "deep.py").read_text() == "y = 2\n"


def test_foreign_folders_are_never_replaced(checkpoint: Path, code_root: Path, tmp_path: Path) -> None:
    foreign = _write(tmp_path / "foreign", {"config.json": "{}", "thesis.tex": "years of work"})
    for folder in (foreign, checkpoint, checkpoint.parent):
        with pytest.raises(FileExistsError):
            gather(checkpoint, folder, code_root=code_root, overwrite=True)
    assert (foreign / "thesis.tex").exists() and (checkpoint / "model.safetensors").exists()


# Publishing


def test_dry_run_needs_no_client(checkpoint: Path, code_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Uploads are tried in `publishing/`, against a server."""
    done = push(checkpoint, "user/name", code_root=code_root, dry_run=True)
    assert {path.name for path in done.files} == CLOSURE | DATA and done.commit is None
    assert re.search(r"^ +71  model.safetensors$", capsys.readouterr().out, flags=re.MULTILINE)
    assert _names(checkpoint.parent) == {"checkpoint", "code"}  # nothing temporary stays


def test_inspection_stops_a_push(checkpoint: Path, code_root: Path) -> None:
    def refuse(folder: Path) -> None:
        assert _names(folder) == CLOSURE | DATA
        raise VerificationError("not good enough")

    with pytest.raises(VerificationError, match="not good enough"):
        push(checkpoint, "user/name", code_root=code_root, inspect=refuse, api=object())


def test_alone_it_gathers_and_says_what_uploading_needs(checkpoint: Path, code_root: Path, tmp_path: Path) -> None:
    """Only Hub files are beside the script: no package, no `publishing/`, no torch."""
    shutil.copyfile(ROOT / "upload_to_hub.py", code_root / "upload_to_hub.py")
    block = "import sys, runpy; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'internvl_hub'])); "
    run = f"{block}sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", run, str(code_root / "upload_to_hub.py"), str(checkpoint)]
    done = subprocess.run([*command, "--folder", str(tmp_path / "out")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and _names(tmp_path / "out") == CLOSURE | DATA, done.stderr
    assert "pipeline_tag: image-text-to-text" in (tmp_path / "out" / "README.md").read_text()
    done = subprocess.run([*command, "--repo", "a/b", "--dry-run"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "uploading needs the folder publishing/" in done.stderr


# Command line


def test_command_line_reports_errors_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert upload.main([str(tmp_path / "absent"), "--folder", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("internvl-upload: there is no checkpoint folder") and error.count("\n") == 1


def test_command_line_passes_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def fake(*args: str, **options: object) -> Published:
        seen.update(options, args=args)
        return Published(())

    monkeypatch.setattr(upload, "push", fake)
    flags = "--public --revision r --create-pr --dry-run --verify --message m --license mit --base-model b/m"
    more = "--base-model c/n --eval e.json --parent-commit abc --tag v1 --replace-card"
    assert upload.main(["c", "--repo", "u/n", *flags.split(), *more.split()]) == 0
    assert seen == {
        "args": ("c", "u/n"), "private": False, "revision": "r", "create_pr": True, "dry_run": True, "check": True,
        "commit_message": "m", "license": "mit", "base_model": ["b/m", "c/n"], "evaluations": ["e.json"],
        "parent_commit": "abc", "tag": "v1", "replace_card": True,
    }  # fmt: skip


def test_last_error_of_an_interpreter() -> None:
    code = "try:\n    1 / 0\nexcept Exception as error:\n    raise ValueError('first line\\n  second') from error"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert upload.last_error(f"a warning\n{done.stderr}") == "ValueError: first line second"
    done = subprocess.run([sys.executable, "-c", "x = ("], capture_output=True, text=True)
    assert upload.last_error(done.stderr).startswith("SyntaxError: ")
    assert upload.last_error("") == "it was ended from outside"


@pytest.mark.newest
def test_verification_says_one_line(checkpoint: Path, code_root: Path, tmp_path: Path) -> None:
    gather(checkpoint, tmp_path / "out", code_root=code_root)
    with pytest.raises(VerificationError, match="does not load on its own: .*Error: ") as caught:
        upload.verify(tmp_path / "out")
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_runs_as_a_plain_script(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "upload_to_hub.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "examples:" in done.stdout


# The real thing


@pytest.fixture(scope="module")
def gathered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gathered") / "tiny-qwen2"
    gather(CHAT / "qwen2-internvl2_5", folder, repo_id=str(folder))
    return folder


def test_fixture_checkpoint_loads_on_its_own(gathered: Path) -> None:
    assert upload.verify(gathered) == "ok: InternVLChatModel InternVLProcessor TokenizersBackend"


def test_processor_follows_the_model_where_none_was_saved(gathered: Path) -> None:
    """56 px tiles of 4 tokens; the defaults of the processor would be 448 px and 256 tokens."""
    config = _json(gathered / "processor_config.json")
    assert (config["template"], config["num_image_token"]) == ("internvl2_5", 4)
    assert config["image_processor"]["image_size"] == 56
    assert not (gathered / "chat_template.jinja").exists()  # the tokenizer keeps its own template


def _card_code(folder: Path) -> list[str]:
    text = (folder / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def _run_card(blocks: list[str], work: Path) -> None:
    """Runs a card's code blocks, one after the other, in a process where only the folder has the code."""
    Image.new("RGB", (80, 60), "red").save(work / "image.jpg")
    code = "\n".join(["import sys", "sys.modules['internvl_hub'] = None", *blocks])
    done = subprocess.run([sys.executable, "-c", code], cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_model_card_code_runs(gathered: Path, tmp_path: Path) -> None:
    blocks = _card_code(gathered)
    assert len(blocks) == 2
    _run_card(blocks, tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "internlm2-internlm2_chat",
        *(pytest.param(name, marks=pytest.mark.newest) for name in ("llama-hermes2-vit6b", "phi3-phi3_chat")),
    ],
)
def test_other_backends_load_on_their_own(name: str, tmp_path: Path) -> None:
    gather(CHAT / name, tmp_path / name)
    assert upload.verify(tmp_path / name).startswith("ok: InternVLChatModel InternVLProcessor")


@pytest.mark.newest
def test_verify_reports_a_folder_that_leans_on_missing_code(gathered: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(gathered, broken)
    (broken / "configuration_intern_vit.py").unlink()
    with pytest.raises(VerificationError, match="configuration_intern_vit"):
        upload.verify(broken)


# A vision encoder on its own

ENCODER_CODE = {"configuration_intern_vit.py", "modeling_intern_vit.py"}
ENCODER_DATA = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
ENCODER_SCRIPT = """
import sys
sys.modules["internvl_hub"] = None
from safetensors.torch import load_file, save_file
from transformers import AutoModel
folder, pixels, output = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
save_file({"features": model(load_file(pixels)["pixels"]).last_hidden_state.detach()}, output)
"""


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return extract_encoder(CHAT / "qwen2-internvl2_5", tmp_path / "encoder")


@pytest.fixture(scope="module")
def gathered_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("encoder")
    extract_encoder(CHAT / "llama-hermes2-vit6b", work / "extracted")
    gather(work / "extracted", work / "vit", repo_id=str(work / "vit"), license="mit", base_model="user/base")
    return work / "vit"


def test_only_what_belongs_to_an_encoder_travels(encoder: Path, tmp_path: Path) -> None:
    _write(encoder, dict.fromkeys(["tokenizer.json", "generation_config.json", "optimizer.pt", "LICENSE"], "{}"))
    files = gather(encoder, tmp_path / "out")
    assert _names(tmp_path / "out") == {path.name for path in files} == ENCODER_CODE | ENCODER_DATA | {"LICENSE"}
    assert _json(tmp_path / "out" / "config.json")["auto_map"] == {
        "AutoConfig": "configuration_intern_vit.InternVisionConfig",
        "AutoModel": "modeling_intern_vit.InternVisionModel",
    }


def test_references_of_an_encoder_into_other_repositories_give_way(encoder: Path, tmp_path: Path) -> None:
    config = _json(encoder / "config.json")
    config["auto_map"]["AutoModel"] = "someone/else--modeling_intern_vit.InternVisionModel"
    _write(encoder, {"config.json": json.dumps(config)})
    gather(encoder, tmp_path / "out")
    auto_map = _json(tmp_path / "out" / "config.json")["auto_map"]
    assert auto_map["AutoModel"] == "modeling_intern_vit.InternVisionModel"


def test_encoder_without_preprocessing_is_refused(encoder: Path, tmp_path: Path) -> None:
    (encoder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="no image preprocessing: looked for preprocessor_config.json"):
        gather(encoder, tmp_path / "out")


@pytest.mark.parametrize("name", [pytest.param("qwen2-internvl2_5", marks=pytest.mark.newest), "llama-hermes2-vit6b"])
def test_encoder_computes_the_same_on_its_own(name: str, tmp_path: Path) -> None:
    """Both flavours, in a process where only the folder has the code, against the encoder inside the chat model."""
    gather(extract_encoder(CHAT / name, tmp_path / "extracted"), tmp_path / "vit")
    pixels = load_file(CHAT / name / "expected.safetensors")["pixel_values"]
    save_file({"pixels": pixels}, tmp_path / "pixels.safetensors")
    arguments = [tmp_path / "vit", tmp_path / "pixels.safetensors", tmp_path / "features.safetensors"]
    command = [sys.executable, "-c", ENCODER_SCRIPT, *map(str, arguments)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        own = InternVLChatModel.from_pretrained(CHAT / name).vision_model(pixels).last_hidden_state
    assert torch.equal(load_file(tmp_path / "features.safetensors")["features"], own)


@pytest.mark.newest
def test_encoder_is_verified(gathered_encoder: Path, tmp_path: Path) -> None:
    assert upload.verify(gathered_encoder).startswith("ok: InternVisionModel CLIPImageProcessor")
    broken = shutil.copytree(gathered_encoder, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights.pop("encoder.layers.0.ls1")
    (broken / "model.safetensors").unlink()  # a link
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="1 missing_keys, such as .*encoder.layers.0.ls1"):
        upload.verify(broken)


@pytest.mark.newest
@pytest.mark.parametrize("repository", ["", "someone/else--"])
def test_own_image_processor_of_an_encoder_travels(repository: str, encoder: Path, tmp_path: Path) -> None:
    """As for features of stretched tiles, which chat models see."""
    InternVLImageProcessor(image_size=56, dynamic_image_size=False).save_pretrained(encoder)
    config = _json(encoder / "preprocessor_config.json")
    reference = config["auto_map"]["AutoImageProcessor"]
    assert reference == upload.IMAGE_PROCESSOR
    config["auto_map"]["AutoImageProcessor"] = repository + reference
    _write(encoder, {"preprocessor_config.json": json.dumps(config)})
    gather(encoder, tmp_path / "out")
    assert {"image_processing_internvl.py", "tiling_internvl.py"} <= _names(tmp_path / "out")
    assert _json(tmp_path / "out" / "preprocessor_config.json")["auto_map"]["AutoImageProcessor"] == reference
    assert upload.verify(tmp_path / "out") == "ok: InternVisionModel InternVLImageProcessor"


def test_encoder_card_holds_metadata(gathered_encoder: Path) -> None:
    text = (gathered_encoder / "README.md").read_text(encoding="utf-8")
    for line in ["pipeline_tag: image-feature-extraction", "- custom_code", "license: mit", "base_model: user/base"]:
        assert line in text


@pytest.mark.newest
def test_encoder_card_code_runs(gathered_encoder: Path, tmp_path: Path) -> None:
    (block,) = _card_code(gathered_encoder)
    _run_card([runnable(block)], tmp_path)
