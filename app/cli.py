"""The command line: `internvl COMMAND ...`. Each command only reads its arguments and calls one function elsewhere."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Modules that load torch are imported by the command that needs them, so that help and errors come at once.

_HUB = ("revision", "token", "cache_dir")


def _describe(options: argparse.Namespace) -> int:
    from ..checkpoint_internvl import read_json
    from ..conversion import families

    if options.name is None:
        print(families.describe_all())
        return 0
    folder = Path(options.name)
    if folder.is_dir():
        subject: Any = read_json(folder / "config.json")
    else:
        subject = families.find(options.name)
    print(families.describe(subject))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from ..conversion.doctor import run
    from ..conversion.serving import ENGINES

    engines = tuple(options.serving or ENGINES) if options.serving is not None else ()
    return run(options.checkpoint, options.fix, options.golden, options.json, engines)


def _upgrade(options: argparse.Namespace) -> int:
    from ..conversion.convert import upgrade

    print(upgrade(options.source, options.target, rewrite=options.rewrite, **_writing(options)))
    return 0


def _convert(options: argparse.Namespace) -> int:
    from ..conversion.convert import convert

    print(convert(options.source, options.target, options.to, **_writing(options)))
    return 0


def _merge(options: argparse.Namespace) -> int:
    from ..conversion.merge import merge

    print(merge(options.source, options.target, options.base, **_writing(options)))
    return 0


def _vision(options: argparse.Namespace) -> int:
    from ..conversion import intern_vit

    if options.action == "cut":
        print(intern_vit.cut_layers(options.source, options.target, options.layers))
    elif options.action == "resize":
        print(intern_vit.resize_positions(options.source, options.target, options.image_size))
    else:
        print(intern_vit.extract_encoder(options.source, options.target))
    return 0


def _upload(arguments: Sequence[str]) -> int:
    from ..upload_to_hub import main as upload

    return upload(arguments)


def _push(arguments: Sequence[str]) -> int:
    from ..publishing.command import push_main

    return push_main(arguments)


def _page(arguments: Sequence[str]) -> int:
    from .page_command import page_main

    return page_main(arguments)


def _serve(arguments: Sequence[str]) -> int:
    from .serve_command import serve_main

    return serve_main(arguments)


def _quantize(arguments: Sequence[str]) -> int:
    from .quantize_command import quantize_main

    return quantize_main(arguments)


def _gguf(arguments: Sequence[str]) -> int:
    from .gguf_command import gguf_main

    return gguf_main(arguments)


def _demo(arguments: Sequence[str]) -> int:
    from .demo import main as demo

    return demo(arguments)


def _train(arguments: Sequence[str]) -> int:
    from .training_commands import train_main

    return train_main(arguments)


def _validate(arguments: Sequence[str]) -> int:
    from .data_commands import validate_main

    return validate_main(arguments)


def _preview(arguments: Sequence[str]) -> int:
    from .data_commands import preview_main

    return preview_main(arguments)


def _estimate(arguments: Sequence[str]) -> int:
    from .estimate_command import estimate_main

    return estimate_main(arguments)


def _pairs(arguments: Sequence[str]) -> int:
    from .pairs_command import pairs_main

    return pairs_main(arguments)


def _eval(arguments: Sequence[str]) -> int:
    from .eval_command import eval_main

    return eval_main(arguments)


# Commands with a parser of their own.
_DELEGATED: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "validate": (_validate, "look for problems in training data"),
    "preview": (_preview, "show rows of training data as the model will see them"),
    "estimate": (_estimate, "compute the memory that a training run will need on each device"),
    "train": (_train, "train a model as a recipe says"),
    "eval": (_eval, "ask a model the questions of a file and score its answers"),
    "pairs": (_pairs, "make preference pairs from a model's own answers"),
    "push": (_push, "publish a checkpoint on the Hub, load it back and compare"),
    "upload": (_upload, "gather a checkpoint with its code into a folder, or publish it on the Hub"),
    "quantize": (_quantize, "write a quantized copy: FP8, int8, GPTQ or AWQ, calibrated on images and text"),
    "gguf": (_gguf, "export to llama.cpp with its own converter, and check the files"),
    "serve": (_serve, "serve a model through OpenAI's protocol"),
    "page": (_page, "chat with a model about images and videos in the browser"),
    "demo": (_demo, "answer questions about example images with the bundled tiny model"),
}


def _writing(options: argparse.Namespace) -> dict[str, Any]:
    hub = {name: getattr(options, name) for name in _HUB if getattr(options, name) is not None}
    return {"max_shard_size": options.max_shard_size, "overwrite": options.overwrite, **hub}


def _command(commands: Any, name: str, run: Callable, help: str, *examples: str) -> argparse.ArgumentParser:
    shown = "examples:\n" + "\n".join(f"  internvl {example}" for example in examples)
    parser = commands.add_parser(
        name, help=help, description=help, epilog=shown, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


def _add_folders(parser: argparse.ArgumentParser, writing: bool = True) -> None:
    parser.add_argument("source", help="folder or Hub repository (organisation/name); never changed")
    parser.add_argument("target", type=Path, help="folder to write; must be absent or empty")
    if writing:
        parser.add_argument("--overwrite", action="store_true", help="replace what an earlier call wrote there")
        parser.add_argument("--max-shard-size", default="5GB", help="of written weight files (default: 5GB)")
        parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
        parser.add_argument("--token", help="access token for private repositories")
        parser.add_argument("--cache-dir", help="where downloads go")


def build_parser() -> argparse.ArgumentParser:
    """The parser of `internvl`."""
    parser = argparse.ArgumentParser(prog="internvl", description="Tools for InternVL checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    describe = _command(
        commands, "describe", _describe, "what a release or a checkpoint is; without a name, all releases",
        "describe", "describe InternVL3-8B", "describe checkpoints/internvl-tiny",
    )  # fmt: skip
    describe.add_argument("name", nargs="?", help="name of a release, or folder of a checkpoint")

    doctor = _command(
        commands, "doctor", _doctor, "look for problems in a checkpoint, reading only headers",
        "doctor OpenGVLab/InternVL3-1B", "doctor my-model --fix my-model-fixed", "doctor my-model --golden golden",
    )  # fmt: skip
    doctor.add_argument("checkpoint", help="folder or Hub repository")
    doctor.add_argument("--fix", type=Path, metavar="FOLDER", help="write a corrected copy")
    doctor.add_argument("--golden", type=Path, metavar="FOLDER", help="write reference ids and pixel hashes")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a table")
    doctor.add_argument(
        "--serving", nargs="*", metavar="ENGINE", help="also whether these can serve it: vllm, lmdeploy, sglang (all)"
    )

    upgrade = _command(
        commands, "upgrade", _upgrade, "write a copy that loads on transformers 5 with this package's code",
        "upgrade OpenGVLab/InternVL2-2B internvl2-2b",
    )  # fmt: skip
    _add_folders(upgrade)
    upgrade.add_argument("--rewrite", action="store_true", help="write the weights anew instead of linking them")

    convert = _command(
        commands, "convert", _convert, "change a checkpoint's layout: original or transformers' own",
        "convert OpenGVLab/InternVL3-1B internvl3-1b-hf --to native", "convert my-model-hf my-model --to original",
    )  # fmt: skip
    _add_folders(convert)
    convert.add_argument("--to", required=True, choices=("original", "native"), help="the layout to write")

    merge = _command(
        commands, "merge", _merge, "merge LoRA adapters, stored inside a checkpoint or by PEFT, into plain weights",
        "merge my-finetune merged", "merge my-adapter merged --base OpenGVLab/InternVL3-1B",
    )  # fmt: skip
    _add_folders(merge)
    merge.add_argument("--base", help="base model of a PEFT adapter (default: the one that it names)")

    vision = _command(
        commands, "vision", _vision, "work on vision encoders", "vision extract OpenGVLab/InternVL3-8B internvit",
        "vision cut OpenGVLab/InternViT-6B-448px-V1-0 cut --layers 45",
        "vision resize OpenGVLab/InternViT-6B-224px resized --image-size 448",
    )  # fmt: skip
    actions = vision.add_subparsers(dest="action", required=True, metavar="ACTION")
    cut = actions.add_parser("cut", help="drop the last layers")
    cut.add_argument("--layers", type=int, required=True, help="layers to keep")
    resize = actions.add_parser("resize", help="resize the position table for another tile size")
    resize.add_argument("--image-size", type=int, required=True, help="tile side in pixels")
    extract = actions.add_parser("extract", help="take the encoder out of a chat checkpoint")
    for action in (cut, resize, extract):
        _add_folders(action, writing=False)

    for name, (_, help) in _DELEGATED.items():
        commands.add_parser(name, help=help, add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code, 1 after a one-line message for what the user can mend."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in _DELEGATED:
        return _DELEGATED[argv[0]][0](argv[1:])
    options = build_parser().parse_args(argv)
    try:
        return options.run(options)
    except (ValueError, OSError, ImportError, RecursionError) as error:  # the last: JSON nested without end
        print(f"internvl {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
