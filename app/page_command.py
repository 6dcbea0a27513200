"""`internvl page`: serves the demo page on this machine, or writes it as a Space."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .page_limits import RANGES

# Modules that load torch or Gradio are imported where they are needed, so that help and errors come at once.

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "checkpoints" / "internvl-tiny"
EXAMPLES = ROOT / "examples" / "images"

_EPILOG = """examples:
  internvl page
  internvl page OpenGVLab/InternVL3_5-1B --device cuda
  internvl page my-model --port 7861 --auth-env PAGE_LOGIN
  internvl page my-name/my-model --export my-space
"""


def _whole(low: int, high: int) -> Callable[[str], int]:
    """A type of options: whole numbers from `low` to `high`."""

    def number(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, got {text!r}")
        return int(text)

    return number


def build_parser() -> argparse.ArgumentParser:
    """Options of `internvl page`."""
    parser = argparse.ArgumentParser(
        prog="internvl page", description="A page to chat with a model about images and videos.", epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("checkpoint", nargs="?", help="folder or Hub repository (default: the bundled tiny model)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=_whole(1, 65535), help="(default: the first free one from 7860)")
    parser.add_argument("--share", action="store_true", help="a public address for a week, through Gradio's servers")
    parser.add_argument("--auth-env", metavar="NAME", help="environment variable with `user:password`, asked for")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument("--device", help="of the model (default: cuda if there is one)")
    parser.add_argument("--dtype", help="of the weights (default: bfloat16 on cuda, else as stored)")
    parser.add_argument("--examples", type=Path, metavar="FOLDER", help="pictures with a questions.json")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write a Space there instead of serving")
    parser.add_argument("--overwrite", action="store_true", help="with --export: replace what is there")
    limits = parser.add_argument_group("limits")
    frames, tokens = (_whole(1, int(RANGES[name][1])) for name in ("frames", "max_new_tokens"))
    limits.add_argument("--max-tiles", type=_whole(1, 9999), metavar="N", help="of a conversation (default: 64)")
    limits.add_argument("--max-new-tokens", type=tokens, metavar="N", help="of an answer (default: 1024)")
    limits.add_argument("--max-frames", type=frames, metavar="N", help="of a video (default: 16)")
    limits.add_argument("--max-conversations", type=_whole(1, 9999), metavar="N", help="kept at once (default: 16)")
    return parser


def page_main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = build_parser()
    options = parser.parse_args(argv)
    checkpoint = options.checkpoint or str(CHECKPOINT)
    examples = options.examples or (EXAMPLES if Path(checkpoint).resolve() == CHECKPOINT else None)
    try:
        if options.export is not None:
            from .page_space import export_space

            folder = export_space(checkpoint, options.export, examples, options.overwrite)
            print(f"wrote the Space to {folder}; upload it: hf upload NAME/SPACE {folder} . --repo-type space")
            return 0
        serve(checkpoint, examples, options)
    except (ValueError, OSError, ImportError) as error:
        print(f"internvl page: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def serve(checkpoint: str, examples: Path | None, options: argparse.Namespace) -> None:
    """Serves the page until it is interrupted; its uploads are deleted then.

    Raises:
        ImportError: Gradio is missing. ValueError, OSError: the checkpoint or an option cannot be used.
    """
    auth = _login(options.auth_env)
    uploads = tempfile.mkdtemp(prefix="internvl_page_")  # readable by this user alone
    os.environ["GRADIO_TEMP_DIR"] = uploads
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)  # `docker stop`; Python would end without deleting the uploads
    try:
        launch = _import_page().launch
        launch(_load(checkpoint, options), uploads, _title(checkpoint), examples, options, auth)
    finally:
        shutil.rmtree(uploads, ignore_errors=True)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _import_page() -> Any:
    try:
        from . import page
    except ImportError as error:
        if "gradio" not in str(error):
            raise
        raise ImportError("the page needs Gradio: pip install 'internvl-hub[demo]' (it needs Pillow < 13)") from error
    return page


def _login(variable: str | None) -> tuple[str, str] | None:
    if variable is None:
        return None
    user, colon, password = os.environ.get(variable, "").partition(":")
    if not (user and colon and password):
        raise ValueError(f"--auth-env: the environment variable {variable} must read user:password")
    return user, password


def _title(checkpoint: str) -> str:
    return Path(checkpoint).resolve().name if Path(checkpoint).is_dir() else checkpoint


def _checked_device(name: str) -> str:
    """The name of a device that can compute here.

    Raises:
        ValueError: it cannot, or there is no such device.
    """
    import torch

    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # each build of torch has its own
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(f"--device {name} cannot be used here: {reason}") from error
    return name


def _load(checkpoint: str, options: argparse.Namespace) -> Any:
    """The model with its limits."""
    import torch

    from ..conversion.folders import resolve
    from ..modeling_internvl_chat import InternVLChatModel
    from ..processing_internvl import InternVLProcessor
    from .page_chat import Host
    from .page_limits import ChatLimits

    device = _checked_device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = options.dtype or ("bfloat16" if device.startswith("cuda") else "auto")
    given = {
        "tiles": options.max_tiles,
        "new_tokens": options.max_new_tokens,
        "conversations": options.max_conversations,
    }
    limits = ChatLimits(**{name: value for name, value in given.items() if value is not None})
    folder = resolve(checkpoint)
    model: Any = InternVLChatModel.from_pretrained(folder, dtype=dtype)
    model.to(device)
    return Host(model, InternVLProcessor.from_pretrained(folder), limits)
