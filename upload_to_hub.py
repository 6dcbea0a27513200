"""Gather a checkpoint and the code that runs it into one self-contained folder, check it, and publish it on the Hub.

Published are chat models and vision encoders on their own (`KINDS`). The code is the import closure of the files that
``auto_map`` names, copied byte for byte; the rest is an allow-list (weights, tokenizer, configurations, chat
template, licence, model card), so that optimizer states, logs and private files never leave; a file that holds a
credential stops an upload. An upload is one commit, so a repository is as it was or complete. The checkpoint itself
is never changed. This file runs alone, beside the Hub files, without torch: `publishing/` adds what it can to the
model card where it is there. It deliberately converts nothing: a checkpoint in another layout is refused.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

CODE_ROOT = Path(__file__).resolve().parent
_MODEL = "modeling_internvl_chat.InternVLChatModel"
AUTO_MAP = {
    "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
    "AutoModel": _MODEL,
    "AutoModelForCausalLM": _MODEL,
    "AutoModelForImageTextToText": _MODEL,
}
PROCESSOR = "processing_internvl.InternVLProcessor"
IMAGE_PROCESSOR = "image_processing_internvl.InternVLImageProcessor"
PREPROCESSING = "preprocessor_config.json"
_SHARD = re.compile(r"\w[\w.-]*\.safetensors")
_REFERENCE = re.compile(r"\w+\.\w+")  # file.Class, the only form that the loader of remote code reads
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

# A folder without this file was not made here, so it is never replaced. Dot files are not uploaded.
MARKER = ".gathered"


@dataclass(frozen=True)
class Kind:
    """What is published with the checkpoints of one model type."""

    auto_map: dict[str, str]  # what config.json must name
    processors: tuple[str, ...]  # further entry files of the code; with them goes a processor_config.json
    own_code: tuple[str, str]  # a file whose auto_map may name code of the checkpoint's own, and the auto class there
    needed: tuple[str, tuple[str, ...]]  # what the checkpoint must have, and the files that it may be in
    copied: tuple[str, ...]  # files that are published unchanged where the checkpoint has them
    loads: tuple[str, ...]  # what must load the published folder beside AutoModel: modules and auto classes
    task: str  # the Hub's name of what the model does


_COPIED = (PREPROCESSING, "LICENSE", "README.md", "loss_curve.png", "preference_curves.png")
_TOKENIZER = ("merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
KINDS = {
    "internvl_chat": Kind(
        auto_map=AUTO_MAP,
        processors=(PROCESSOR, IMAGE_PROCESSOR),
        own_code=("tokenizer_config.json", "AutoTokenizer"),
        needed=("tokenizer", VOCABULARIES),
        copied=(*VOCABULARIES, *_TOKENIZER, "generation_config.json", "chat_template.jinja", *_COPIED),
        loads=("processing_auto.AutoProcessor", "tokenization_auto.AutoTokenizer"),
        task="image-text-to-text",
    ),
    "intern_vit_6b": Kind(  # the released name for every size
        auto_map={
            "AutoConfig": "configuration_intern_vit.InternVisionConfig",
            "AutoModel": "modeling_intern_vit.InternVisionModel",
        },
        processors=(),
        own_code=(PREPROCESSING, "AutoImageProcessor"),
        needed=("image preprocessing", (PREPROCESSING,)),
        copied=_COPIED,
        loads=("image_processing_auto.AutoImageProcessor",),
        task="image-feature-extraction",
    ),
}


# Files that a push may have written and that change how a checkpoint loads: deleted where a later one lacks them.
# With an adapter beside them, `from_pretrained` would load the adapter's base model instead of the weights.
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_OWNED = frozenset({"processor_config.json", *_ADAPTER}.union(*(kind.copied for kind in KINDS.values())))


class CheckpointError(FileNotFoundError):
    """The checkpoint folder lacks something that a published one needs."""


class LayoutError(ValueError):
    """A file of the checkpoint is there, but cannot be published as it is."""


class HubCodeError(ImportError):
    """The loader of remote code would not find a file that the code needs."""


class VerificationError(RuntimeError):
    """The gathered folder does not load on its own, or computes something else than the checkpoint."""


def relative_imports(path: Path) -> list[str]:
    """Names of the sibling modules that a Python file imports, in the order of the syntax tree.

    Raises:
        HubCodeError: the file uses a form that transformers' loader cannot follow (``from . import x``, a dotted or a
            parent module), or is no Python.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise HubCodeError(f"{path} cannot be read as Python: {error}") from error
    names = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        if node.level > 1 or node.module is None or "." in node.module:
            raise HubCodeError(
                f"{path.name}:{node.lineno}: the loader cannot follow `{ast.unparse(node)}`; Hub files are flat, so "
                "import by name from a file beside this one"
            )
        names.append(node.module)
    return names


def hub_files(entries: Iterable[Path]) -> list[Path]:
    """Return the entry files and every file that they import relatively, directly or not, each once.

    Raises:
        HubCodeError: a file is missing, or an import is not flat (see `relative_imports`).
    """
    queue = [(Path(entry), "auto_map") for entry in entries]
    found: dict[Path, None] = {}
    for path, wanted_by in queue:  # grows while it is walked
        if path in found:
            continue
        if not path.is_file():
            raise HubCodeError(f"{path.name}, which {wanted_by} names, is not in {path.parent}")
        found[path] = None
        queue += [(path.parent / f"{name}.py", path.name) for name in relative_imports(path)]
    return list(found)


def kind_of(folder: Path, config: dict[str, Any]) -> Kind:
    """Return what goes with a checkpoint of this configuration; `LayoutError` if none of `KINDS` does."""
    model_type = config.get("model_type")
    kind = KINDS.get(model_type) if isinstance(model_type, str) else None
    if kind is None:
        raise LayoutError(
            f"{folder}/config.json says model_type={model_type!r}; only {' and '.join(KINDS)} "
            "checkpoints are published, so convert it first"
        )
    return kind


def complete_auto_map(own: Any, auto_map: dict[str, str], code_root: Path) -> dict[str, str]:
    """`auto_map`, overridden by the checkpoint's own entries where they name a file that is published with it.

    References into another repository (``user/name--file.Class``, which transformers writes after loading from the
    Hub) would make the published checkpoint run that repository's code: they give way.

    Raises:
        LayoutError: `own` is no mapping, or a further entry is something else than ``file.Class``.
    """
    if not isinstance(own or {}, dict):
        raise LayoutError(f"auto_map in config.json must map auto classes to file.Class, got {own!r}")
    further = {key: reference for key, reference in (own or {}).items() if key not in auto_map}
    for reference in further.values():
        _entry(reference, code_root)
    local = {key: own[key] for key in auto_map if own and _is_published(own.get(key), code_root)}
    return {**auto_map, **local, **further}


def _entry(reference: Any, code_root: Path) -> Path:
    """The file that an entry of an ``auto_map`` names. A path in it could name any Python file of the disk."""
    if not (isinstance(reference, str) and _REFERENCE.fullmatch(reference)):
        raise LayoutError(f"auto_map names {reference!r}: write file.Class, of a Python file beside the weights")
    return code_root / f"{reference.partition('.')[0]}.py"


def _is_published(reference: Any, folder: Path) -> bool:
    valid = isinstance(reference, str) and _REFERENCE.fullmatch(reference)
    return bool(valid) and _entry(reference, folder).is_file()


def weight_files(checkpoint: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint, with the index if they are sharded.

    Raises:
        CheckpointError: there are none, or a shard that the index names is missing.
        LayoutError: a single file and an index contradict each other, the index has no ``weight_map``, or a shard is
            named by a path.
    """
    single, index = checkpoint / "model.safetensors", checkpoint / "model.safetensors.index.json"
    if single.is_file() and index.is_file():
        raise LayoutError(f"{checkpoint} has both {single.name} and {index.name}: remove the stale one")
    if single.is_file():
        return [single]
    if not index.is_file():
        looked_for = f"{single.name} and {index.name}"
        raise CheckpointError(f"{checkpoint} has no weights: looked for {looked_for}.{_hint(checkpoint)}")
    weight_map = read_json(index).get("weight_map")
    if not (isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())):
        raise LayoutError(f"{index} has no weight_map of tensor names to files: fetch or write it again")
    names = sorted(set(weight_map.values()))
    if strange := [name for name in names if not _SHARD.fullmatch(name)]:
        raise LayoutError(f"{index} names shards that are no safetensors files of its folder: {strange}")
    if missing := [name for name in names if not (checkpoint / name).is_file()]:
        raise CheckpointError(f"{checkpoint} lacks shards that {index.name} names: {', '.join(missing)}")
    return [*(checkpoint / name for name in names), index]


def _hint(checkpoint: Path) -> str:
    if (checkpoint / "adapter_model.safetensors").is_file():
        return " It holds an adapter: merge that into its base model and save the result first."
    if any(checkpoint.glob("pytorch_model*.bin")):
        return " Pickled weights are not published: load the model and save it again to get safetensors."
    return ""


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object; `CheckpointError` if the file is missing, `LayoutError` if it is not a JSON object."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LayoutError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise LayoutError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def data_files(checkpoint: Path, kind: Kind) -> list[Path]:
    """Return the files beside the weights that are published unchanged.

    Raises:
        CheckpointError: what the kind needs (a tokenizer, or image preprocessing) is not among them.
    """
    what, names = kind.needed
    if not any((checkpoint / name).is_file() for name in names):
        raise CheckpointError(f"{checkpoint} has no {what}: looked for {', '.join(names)}")
    return [checkpoint / name for name in kind.copied if (checkpoint / name).is_file()]


def refuse_escapes(files: Iterable[Path], checkpoint: Path) -> None:
    """Raise `LayoutError` for a symbolic link that leaves the checkpoint's folder.

    A snapshot in the Hub's cache is made of links to the ``blobs`` folder of the same repository; those may pass.
    """
    root = checkpoint.resolve()
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for file in files:
        if not any(file.resolve().is_relative_to(folder) for folder in allowed):
            raise LayoutError(f"{file} links to {file.resolve()}, outside the checkpoint: copy the file in its place")


def own_code(checkpoint: Path, name: str, auto_class: str, code_root: Path) -> list[Path]:
    """Return the code of a custom class that the ``auto_map`` of a file names, from either folder; often none.

    References into another repository count where a file of that name is published from here (see `drop_repository`).
    """
    path = checkpoint / name
    auto_map = read_json(path).get("auto_map") or {} if path.is_file() else {}
    references = auto_map.get(auto_class) if isinstance(auto_map, dict) else auto_map
    files: list[Path] = []
    for reference in references if isinstance(references, list) else [references]:
        if reference is None:  # of [slow, fast] one is null
            continue
        repository, _, local = reference.rpartition("--") if isinstance(reference, str) else ("", "", reference)
        roots = [root for root in (code_root, checkpoint) if _entry(local, root).is_file()]
        if roots or not repository:
            files += hub_files([_entry(local, (roots or [checkpoint])[0])])
    return files


def drop_repository(path: Path) -> None:
    """Make references of an ``auto_map`` into another repository local where the file is published beside `path`.

    Else that repository's code would run, as in `complete_auto_map`. Other files stay as they are, to the byte.
    """
    values = read_json(path) if path.is_file() else {}
    auto_map = _local(values.get("auto_map"), path.parent)
    if auto_map != values.get("auto_map"):
        write_json(path, {**values, "auto_map": auto_map})


def _local(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {key: _local(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_local(item, folder) for item in value]
    local = value.rpartition("--")[2] if isinstance(value, str) else ""
    return local if _is_published(local, folder) else value


def drop_local_names(path: Path) -> None:
    """Remove ``_name_or_path`` and ``name_or_path`` at any depth: transformers notes there whence it loaded last.

    That is a folder of somebody's disk as often as a Hub name, and nothing reads it. Other files stay, to the byte.
    """
    values = read_json(path)
    if (kept := _without_names(values)) != values:
        write_json(path, kept)


def _without_names(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_names(each) for key, each in value.items() if key.lstrip("_") != "name_or_path"}
    return [_without_names(each) for each in value] if isinstance(value, list) else value


def processor_config(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the content of ``processor_config.json`` with the references that the auto classes read.

    ``AutoProcessor`` reads ``auto_map`` at its top level, ``AutoImageProcessor`` in the nested ``image_processor``.
    """
    images = saved.get("image_processor") or {}
    if not isinstance(images, dict):
        raise LayoutError(f"image_processor in processor_config.json must be an object, got {images!r}")
    return {
        **saved,
        "processor_class": PROCESSOR.rpartition(".")[2],
        "auto_map": {"AutoProcessor": PROCESSOR},
        "image_processor": {
            **images,
            "image_processor_type": IMAGE_PROCESSOR.rpartition(".")[2],
            "auto_map": {"AutoImageProcessor": IMAGE_PROCESSOR},
        },
    }


def derive_processor(staged: Path) -> dict[str, Any]:
    """Return what ``processor_config.json`` says for a checkpoint from before processors were saved.

    The staged code decides, since the rules (tiles, tokens per tile, template) are its own; this takes some seconds.

    Raises:
        VerificationError: the configuration, the tokenizer or the code does not load.
    """
    with tempfile.TemporaryDirectory() as folder:
        _run_isolated(_DERIVE, str(staged), PROCESSOR, folder)
        return read_json(Path(folder) / "processor_config.json")


def gather(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    code_root: str | Path = CODE_ROOT,
    overwrite: bool = False,
    **card: Any,
) -> list[Path]:
    """Make `folder` a self-contained copy of a checkpoint that ``trust_remote_code=True`` loads.

    The folder appears complete or not at all. Weights are hard links where the file system allows it: treat the
    folder as read-only.

    Args:
        checkpoint: a folder written by ``save_pretrained``, or a published one.
        folder: where to gather; must be absent or empty.
        code_root: the folder that holds the Hub files.
        overwrite: replace a folder that an earlier call made; any other is refused all the same.
        card: ``repo_id``, ``license``, ``base_model`` and ``evaluations`` for the model card (see `write_card`).

    Returns:
        The gathered files, sorted.

    Raises:
        CheckpointError: the folder, its configuration, weights, tokenizer or image preprocessing are missing.
        LayoutError: a file cannot be published as it is.
        HubCodeError: the code is incomplete.
        FileExistsError: `folder` holds something that must not be lost.
    """
    checkpoint, folder, code_root = Path(checkpoint).resolve(), Path(folder).resolve(), Path(code_root).resolve()
    if not checkpoint.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {checkpoint}")
    _refuse_loss(checkpoint, folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        staged = Path(temporary) / "new"
        staged.mkdir()
        try:
            _fill(checkpoint, staged, code_root, {"repo_id": folder.name, **card})
        except RecursionError as error:
            raise LayoutError(f"a file of {checkpoint} is nested too deeply to be read") from error
        if folder.exists():
            folder.rename(Path(temporary) / "old")
        staged.rename(folder)
    return _uploaded(folder)


def _fill(checkpoint: Path, staged: Path, code_root: Path, card: dict[str, Any]) -> None:
    config = read_json(checkpoint / "config.json")
    kind = kind_of(checkpoint, config)
    config["auto_map"] = complete_auto_map(config.get("auto_map"), kind.auto_map, code_root)
    references = dict.fromkeys([*config["auto_map"].values(), *kind.processors])
    code = hub_files(dict.fromkeys(_entry(reference, code_root) for reference in references))
    code += own_code(checkpoint, *kind.own_code, code_root)
    weights, data = weight_files(checkpoint), data_files(checkpoint, kind)
    own = [file for file in code if file.is_relative_to(checkpoint) and not file.is_relative_to(code_root)]
    refuse_escapes([*weights, *data, *own, *checkpoint.glob("*config.json")], checkpoint)
    if check := _companion("weights_check"):
        try:
            check.refuse_damaged(weights)
        except ValueError as error:
            raise LayoutError(str(error)) from error
    for file in weights:
        link_or_copy(file, staged / file.name)
    for file in [*data, *code]:
        shutil.copyfile(file, staged / file.name)
    write_json(staged / "config.json", config)
    make_readable_by_v4(staged / "tokenizer_config.json")
    drop_repository(staged / kind.own_code[0])
    if kind.processors:
        processor = checkpoint / "processor_config.json"
        saved = read_json(processor) if processor.is_file() else derive_processor(staged)
        write_json(staged / processor.name, processor_config(saved))
    for file in staged.glob("*config.json"):
        drop_local_names(file)
    write_card(staged / "README.md", checkpoint, kind.task, **card)
    (staged / MARKER).touch()


def make_readable_by_v4(path: Path) -> None:
    """Rewrite two fields of a ``tokenizer_config.json`` that transformers 5 writes in ways 4 cannot read.

    The same as in ``processing_internvl.py``, which this script must not import.
    """
    if not path.is_file():
        return
    values = read_json(path)
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(path, values)


def _refuse_loss(checkpoint: Path, folder: Path, overwrite: bool) -> None:
    if checkpoint.is_relative_to(folder):
        raise FileExistsError(f"{folder} holds the checkpoint itself: gather into another folder")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / MARKER).is_file():
        raise FileExistsError(f"{folder} exists and was not gathered by this tool: choose another")
    if not overwrite:
        raise FileExistsError(f"{folder} was gathered before: pass overwrite=True (--overwrite) to replace it")


def link_or_copy(source: Path, target: Path) -> None:
    """Link `target` to the file behind `source`, or copy it where the file system has no hard links."""
    source = source.resolve()
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON, indented by two spaces."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _uploaded(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name != MARKER)


def write_card(
    path: Path,
    checkpoint: Path,
    task: str,
    repo_id: str,
    license: str | None = None,
    base_model: str | Sequence[str] | None = None,
    evaluations: Sequence[str | Path] = (),
) -> None:
    """Write the model card, or add to the metadata of the checkpoint's own, whose text stays.

    Args:
        path: of the card.
        checkpoint: may be the output folder of a training run, which the card then describes.
        task: the Hub's name of what the model does.
        repo_id, license, base_model: as the Hub names them.
        evaluations: ``report.json`` files of ``internvl eval``.

    Raises:
        LayoutError: evaluations are given, and `publishing/` is not beside this file; or one cannot be published.
    """
    more = {"license": license, "base_model": base_model}
    if cards := _companion("cards"):
        try:
            cards.write(path, checkpoint, task, repo_id, evaluations=evaluations, **more)
        except ValueError as error:
            raise LayoutError(str(error)) from error
    elif evaluations:
        raise LayoutError("evaluations in the model card need the folder publishing/ beside upload_to_hub.py")
    elif not path.exists():
        from huggingface_hub import ModelCardData

        data = ModelCardData(library_name="transformers", pipeline_tag=task, tags=["internvl", "custom_code"], **more)
        path.write_text(f"---\n{data.to_yaml()}\n---\n\n# {repo_id.rpartition('/')[2]}\n", encoding="utf-8")


def _companion(name: str, needed: bool = False) -> Any:
    """A module of `publishing/`; where this file lies alone None, or an ImportError."""
    if not (CODE_ROOT / "publishing" / f"{name}.py").is_file():
        if needed:
            raise ImportError(f"uploading needs the folder publishing/ in {CODE_ROOT}; --folder works without it")
        return None
    return import_module(f"{__package__}.publishing.{name}" if __package__ else f"publishing.{name}")


_DERIVE = """
from transformers import AutoConfig, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module
checkpoint, reference, folder = sys.argv[1:]
config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
processor = get_class_from_dynamic_module(reference, checkpoint).from_model_config(config, tokenizer)
processor.save_pretrained(folder)
"""

# The classes come from their modules: below 5.18 `transformers.AutoImageProcessor` itself asks for torchvision.
_LOAD = """
from importlib import import_module
from transformers import AutoModel
folder, *references = sys.argv[1:]
options = {"trust_remote_code": True}
model, info = AutoModel.from_pretrained(folder, output_loading_info=True, **options)
for name in "missing_keys", "unexpected_keys", "mismatched_keys":
    assert not info[name], f"{len(info[name])} {name}, such as {sorted(info[name])[:3]}"
loaded = {"AutoModel": model}
for module, name in (reference.split(".") for reference in references):
    auto = getattr(import_module(f"transformers.models.auto.{module}"), name)
    loaded[name] = auto.from_pretrained(folder, **options)
for value in model, loaded.get("AutoProcessor", model):
    assert type(value).__module__.startswith("transformers_modules."), f"{type(value)} is not the folder's class"
print("ok:", *(type(value).__name__ for value in loaded.values()))
"""


def verify(folder: str | Path) -> str:
    """Load a gathered folder in a fresh, offline interpreter in which this package cannot be imported.

    Returns:
        One line that names the loaded classes.

    Raises:
        VerificationError: a class does not load or is not the folder's own, or the weights do not fit the model.
    """
    folder = Path(folder).resolve()
    kind = kind_of(folder, read_json(folder / "config.json"))
    return _run_isolated(_LOAD, str(folder), *kind.loads).strip().splitlines()[-1]


def _run_isolated(code: str, *arguments: str) -> str:
    # An installed copy must not help, nor a cache that other remote code has been in.
    code = f"import sys\nsys.modules['internvl_hub'] = None\n{code}"
    with tempfile.TemporaryDirectory() as empty:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": empty}
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise VerificationError(f"{arguments[0]} does not load on its own: {last_error(done.stderr)}")
    return done.stdout


def last_error(text: str) -> str:
    """The exception that ended an interpreter, as one line, from what it wrote to its standard error."""
    trace = text.rpartition("Traceback (most recent call last):\n")[2].splitlines()
    starts = [number for number, line in enumerate(trace) if line and not line[0].isspace()]
    return " ".join(" ".join(trace[starts[0] :] if starts else trace).split())[:1000] or "it was ended from outside"


def push(
    checkpoint: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    dry_run: bool = False,
    check: bool = False,
    commit_message: str = "Upload model and code",
    license: str | None = None,
    base_model: str | Sequence[str] | None = None,
    evaluations: Sequence[str | Path] = (),
    inspect: Callable[[Path], Any] | None = None,
    code_root: str | Path = CODE_ROOT,
    api: Any = None,
    **where: Any,
) -> Any:
    """Gather a checkpoint into a temporary folder and upload that in one commit; needs `publishing/`.

    Args:
        checkpoint, code_root: as for `gather`.
        repo_id: ``user/name``; created if it does not exist.
        token: access token; by default the one of ``hf auth login``.
        dry_run: only print what would be uploaded; no request is made.
        check: `verify` the folder first.
        commit_message: of the commit.
        license, base_model, evaluations: for the model card, see `write_card`.
        inspect: called with the gathered folder before anything is sent; what it raises stops the upload.
        api: stands in for ``huggingface_hub.HfApi(token=token)``.
        where: ``private`` (default: True), ``revision``, ``create_pr``, ``parent_commit``, ``tag``, ``replace_card``,
            as for `publishing.hub.commit`.

    Returns:
        A `publishing.hub.Published`: names of the files, commit, addresses.

    Raises:
        SecretError: a file, or one that the card is made of, holds what looks like a credential.
        ConflictError: the branch is not, or no longer, where it was expected, or the tag exists.
        UploadError: the connection broke; calling again completes the upload.
        and what `gather` raises.
    """
    hub, secrets = _companion("hub", needed=True), _companion("secrets_check", needed=True)
    hub.check_repo_id(repo_id)
    card = {"repo_id": repo_id, "license": license, "base_model": base_model, "evaluations": evaluations}
    with beside(Path(checkpoint)) as temporary:
        folder = Path(temporary) / repo_id.rpartition("/")[2]
        files = gather(checkpoint, folder, code_root=code_root, **card)
        secrets.refuse_secrets([*secrets.card_sources(Path(checkpoint)), *files])
        if check:
            print(verify(folder))
        if inspect is not None:
            inspect(folder)
        hub.show(files, Path(checkpoint))
        if dry_run:
            return hub.Published(tuple(Path(file.name) for file in files))
        if license or base_model or evaluations:  # for a card that is on the Hub already, too
            where["complete_card"] = lambda path: write_card(path, Path(checkpoint), _task(folder), **card)
        api = api or hub.hub_api(token)
        return hub.commit(files, repo_id, api=api, owned=_OWNED, message=commit_message, **where)


def _task(folder: Path) -> str:
    return kind_of(folder, read_json(folder / "config.json")).task


@contextmanager
def beside(checkpoint: Path) -> Iterator[str]:
    """A temporary folder on the checkpoint's file system, so that weights can be linked; elsewhere if read-only."""
    parent = checkpoint.resolve().parent
    writable = os.access(parent, os.W_OK)
    with tempfile.TemporaryDirectory(dir=parent if writable else None, prefix=".upload.") as temporary:
        yield temporary


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser of ``internvl-upload``."""
    parser = argparse.ArgumentParser(
        prog="internvl-upload",
        description=__doc__.partition("\n\n")[0],
        epilog="examples:\n  internvl-upload runs/tiny --folder build/tiny --verify\n"
        "  internvl-upload runs/tiny --repo user/name --license mit --dry-run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint", help="folder with config.json and safetensors weights of a chat model or encoder"
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--folder", help="only gather, into this folder")
    target.add_argument("--repo", help="publish to this repository (user/name)")
    parser.add_argument("--verify", action="store_true", help="load the gathered folder in a clean interpreter first")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that this tool gathered")
    parser.add_argument("--dry-run", action="store_true", help="with --repo: print the files and upload nothing")
    parser.add_argument("--public", action="store_true", help="with --repo: a new repository is public")
    parser.add_argument("--revision", help="with --repo: branch to commit to")
    parser.add_argument("--create-pr", action="store_true", help="with --repo: open a pull request")
    parser.add_argument("--parent-commit", help="with --repo: refuse unless the branch is at this commit")
    parser.add_argument("--tag", help="with --repo: name the commit")
    parser.add_argument("--replace-card", action="store_true", help="with --repo: replace the README.md that is there")
    parser.add_argument("--message", default="Upload model and code", help="with --repo: commit message")
    parser.add_argument("--license", help="licence identifier for the model card")
    parser.add_argument("--base-model", action="append", help="base model of the model card; may be repeated")
    parser.add_argument("--eval", action="append", default=[], metavar="FILE", help="report.json of an evaluation")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code, 1 after a one-line message for what the user can mend."""
    arguments = build_parser().parse_args(argv)
    card = {"license": arguments.license, "base_model": arguments.base_model, "evaluations": arguments.eval}
    try:
        if arguments.folder:
            gather(arguments.checkpoint, arguments.folder, overwrite=arguments.overwrite, **card)
            print(verify(arguments.folder) if arguments.verify else f"gathered {arguments.folder}")
        else:
            done = push(
                arguments.checkpoint,
                arguments.repo,
                private=not arguments.public,
                revision=arguments.revision,
                create_pr=arguments.create_pr,
                dry_run=arguments.dry_run,
                check=arguments.verify,
                commit_message=arguments.message,
                parent_commit=arguments.parent_commit,
                tag=arguments.tag,
                replace_card=arguments.replace_card,
                **card,
            )
            print(done.summary)
    except (OSError, ValueError, ImportError, VerificationError) as error:
        print(f"internvl-upload: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
