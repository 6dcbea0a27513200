"""`internvl push`: a checkpoint with its code, processor and model card to the Hub, loaded back and compared.

The order: gather and check here, compute one output here, upload everything in one commit, load that commit from the
Hub into an empty cache and compare. `internvl-upload` (`upload_to_hub.py`) is the part of this that runs without the
package.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..upload_to_hub import HubCodeError, VerificationError, beside, kind_of, push, read_json
from .evaluations import read_report
from .hub import Published, hub_api
from .probe import Output, ProbeError, compare, probe

_EXAMPLES = """examples:
  internvl push runs/mine user/my-model --license mit --dry-run
  internvl push runs/mine user/my-model --license mit --eval eval_results/mine/plain-test/report.json --tag v1
  internvl push runs/mine organisation/model --create-pr
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of `internvl push`."""
    parser = argparse.ArgumentParser(
        prog="internvl push",
        description="publish a checkpoint on the Hub, privately unless told otherwise",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="folder of a chat model or encoder, such as a run's output")
    parser.add_argument("repo", metavar="USER/NAME", help="repository; created if it does not exist")
    parser.add_argument("--dry-run", action="store_true", help="list files and sizes, send nothing")
    parser.add_argument("--public", action="store_true", help="a new repository is public")
    card = parser.add_argument_group("model card")
    card.add_argument("--license", metavar="ID", help="licence, such as mit or apache-2.0")
    card.add_argument("--base-model", action="append", metavar="NAME", help="(default: as the run's recipe says)")
    card.add_argument("--eval", action="append", default=[], metavar="FILE", help="report.json of internvl eval")
    card.add_argument("--replace-card", action="store_true", help="replace the repository's README.md, kept otherwise")
    where = parser.add_argument_group("where and how")
    where.add_argument("--revision", metavar="BRANCH", help="branch to commit to, created if it does not exist")
    where.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    where.add_argument("--parent-commit", metavar="SHA", help="refuse unless the branch is at this commit")
    where.add_argument("--tag", help="name the commit, so that revision=TAG loads it for good")
    where.add_argument("--message", default="Upload model and code", help="of the commit")
    where.add_argument("--no-verify", action="store_true", help="do not load the commit back and compare")
    where.add_argument(
        "--native", nargs="?", const="", metavar="REPO",
        help="also publish a copy for transformers' own classes (default name: USER/NAME-hf)",
    )  # fmt: skip
    return parser


def publish(options: argparse.Namespace, api: Any = None) -> Published:
    """What the command does; `api` stands in for the Hub's client.

    Raises:
        ProbeError: The published model does not load or computes something else.
        and what `upload_to_hub.push` raises.
    """
    task = kind_of(options.checkpoint, read_json(options.checkpoint / "config.json")).task
    _check_evaluations(options.checkpoint, options.eval)
    local: list[Output] = []
    verify = not (options.dry_run or options.no_verify)
    api = api if api is not None or options.dry_run else hub_api()
    done = push(
        options.checkpoint,
        options.repo,
        api=api,
        inspect=(lambda folder: local.append(probe(folder, task))) if verify else None,
        license=options.license,
        base_model=options.base_model,
        evaluations=options.eval,
        commit_message=options.message,
        **({"dry_run": True} if options.dry_run else _where(options)),
    )
    print(done.summary)
    if verify:
        _load_back(options, api, done, task, local[0])
    if options.native is not None:
        _publish_native(options, api)
    return done


def _where(options: argparse.Namespace) -> dict[str, Any]:
    names = ("revision", "create_pr", "parent_commit", "tag", "replace_card")
    return {"private": not options.public, **{name: getattr(options, name) for name in names}}


def _check_evaluations(checkpoint: Path, paths: Sequence[str]) -> None:
    """Raises ValueError for a report on other weights than those that are published."""
    from ..app.engine_options import weights_digest

    for path in paths:
        evaluated = (read_report(path).get("settings") or {}).get("weights")
        if evaluated is not None and evaluated != weights_digest(checkpoint):
            raise ValueError(f"{path} reports on other weights than those of {checkpoint}: evaluate these first")


def _load_back(
    options: argparse.Namespace, api: Any, done: Published, task: str, local: Output, layout: str = "original",
    repo: str | None = None,
) -> None:  # fmt: skip
    repo = repo or options.repo
    environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": api.endpoint}
    if isinstance(api.token, str):
        environment["HF_TOKEN"] = api.token
    with beside(options.checkpoint) as cache:
        found = probe(
            repo, task, layout=layout, revision=done.commit, environment=environment, cache=Path(cache) / "hub"
        )
    print(compare(found, local, f"{repo} at {(done.commit or '')[:12]}"))


def _publish_native(options: argparse.Namespace, api: Any) -> None:
    from .native import make_native, push_native

    repo = options.native or f"{options.repo}-hf"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(beside(options.checkpoint))) / "native"
        local = make_native(options.checkpoint, folder, repo, options.repo, options.license)
        where = {key: value for key, value in _where(options).items() if key != "parent_commit"}
        done = push_native(folder, repo, options.dry_run, api=api, message=options.message, **where)
    if done.commit:
        print(done.summary)
    if not (options.dry_run or options.no_verify):
        _load_back(options, api, done, "image-text-to-text", local, "native", repo)


def push_main(arguments: Sequence[str], api: Any = None) -> int:
    """Runs the command line; returns the exit code, 1 after a one-line message for what the user can mend."""
    options = build_parser().parse_args(arguments)
    try:
        publish(options, api)
    except (OSError, ValueError, HubCodeError, ImportError, VerificationError, ProbeError) as error:
        print(f"internvl push: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
