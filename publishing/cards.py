"""Model cards: metadata for the Hub, usage, and what is known of training, evaluation and licence.

A card that is there already keeps its text; only metadata that the caller gives is added to it, and scores to a table
of this module in it. This needs huggingface_hub and jinja2, neither torch nor the rest of the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .card_templates import CARD, NATIVE_USAGE, USAGE
from .evaluations import eval_results, read_report, table, update_table
from .run_facts import read_run

_TAGS = ["internvl", "custom_code"]


def write(
    path: Path,
    checkpoint: Path,
    task: str,
    repo_id: str,
    *,
    license: str | None = None,
    base_model: str | Sequence[str] | None = None,
    evaluations: Sequence[str | Path] = (),
) -> None:
    """Writes a model card, or completes the metadata of the one at `path`.

    Args:
        path: Of the card.
        checkpoint: Folder of the checkpoint; that of a training run is described.
        task: The Hub's name of what the model does.
        repo_id: `user/name`.
        license: Identifier of the licence.
        base_model: Hub names; by default those that the run began with.
        evaluations: `report.json` files.

    Raises:
        ValueError: A report or a file of the run cannot be read, or the metadata of the card is no YAML.
    """
    contents = [read_report(each) for each in evaluations]
    given = {"license": license, "base_model": _listed(base_model)}
    if path.exists():
        _complete(path, repo_id, task, {key: value for key, value in given.items() if value}, contents)
        return
    run = read_run(checkpoint)
    given["base_model"] = given["base_model"] or _listed(run.bases if run else None)
    text = _render(USAGE[task], task, repo_id, given, contents, run=run, tags=_TAGS)
    path.write_text(text, encoding="utf-8")


def write_native(path: Path, repo_id: str, original: str, license: str | None = None) -> None:
    """Writes the card of a copy in transformers' own layout; `original` is the repository that it is a copy of."""
    given = {"license": license, "base_model": original}
    task = "image-text-to-text"
    path.write_text(_render(NATIVE_USAGE, task, repo_id, given, [], original=original, tags=_TAGS[:1]), "utf-8")


def _render(
    usage: str, task: str, repo_id: str, given: dict[str, Any], contents: list[dict[str, Any]], **more: Any
) -> str:
    import jinja2
    from huggingface_hub import ModelCard

    name = repo_id.rpartition("/")[2]
    license, run = given["license"], more.get("run")
    card = ModelCard.from_template(
        _card_data(task, name, given, contents, more.pop("tags")),
        template_str=CARD,
        name=name,
        usage=jinja2.Template(usage).render(repo_id=repo_id, original=more.get("original")).strip(),
        evaluations=table(contents) if contents else "",
        license_line=f"`{license}`" if license else "",
        run=run,
    )
    return str(card).rstrip() + "\n"


def _card_data(task: str, name: str, given: dict[str, Any], contents: list[dict[str, Any]], tags: list[str]) -> Any:
    from huggingface_hub import ModelCardData

    results = {"model_name": name, "eval_results": eval_results(contents, task)} if contents else {}
    return ModelCardData(library_name="transformers", pipeline_tag=task, tags=list(tags), **given, **results)


def _complete(path: Path, repo_id: str, task: str, given: dict[str, Any], contents: list[dict[str, Any]]) -> None:
    if not given and not contents:
        return
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(path.read_text(encoding="utf-8-sig"), ignore_metadata_errors=False)
    except Exception as error:  # what a YAML parser or the checks of metadata raise
        raise ValueError(f"the metadata of {path.name} cannot be read: {error}") from error
    for key, value in given.items():
        card.data[key] = value
    if contents:
        card.data.model_name = card.data.get("model_name") or repo_id.rpartition("/")[2]
        mine = eval_results(contents, task)
        replaced = {result.unique_identifier for result in mine}
        kept = [each for each in card.data.eval_results or [] if each.unique_identifier not in replaced]
        card.data.eval_results = kept + mine
        card.text = update_table(card.text, contents)
    path.write_text(str(card), encoding="utf-8")


def _listed(names: str | Sequence[str] | None) -> str | list[str] | None:
    """One name alone, several as a list, none as None."""
    if not names or isinstance(names, str):
        return names or None
    return names[0] if len(names) == 1 else list(names)
