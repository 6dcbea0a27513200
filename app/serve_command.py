"""`internvl serve`: hosts a model behind the OpenAI-compatible server of transformers; see `serving/`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .commands import run_command

if TYPE_CHECKING:
    from ..serving.settings import ServeSettings

# Modules that load torch are imported where they are needed, so that help and errors come at once.

_EPILOG = """\
examples:
  internvl serve OpenGVLab/InternVL3_5-1B
  internvl serve my-model --port 8001 --max-num 6 --keep-markup
  internvl serve my-model --host 0.0.0.0 --api-key-env SERVE_KEY --allow-urls public

Clients of OpenAI's protocol then use http://localhost:8000/v1 with the model's name, which /v1/models lists.
"""


def serve_main(argv: Sequence[str]) -> int:
    """Serves until it is interrupted; returns 0, or 1 after an error that the user can mend."""
    return run_command(_serve, build_parser(), argv)


def build_parser() -> argparse.ArgumentParser:
    """Options of `internvl serve`."""
    parser = argparse.ArgumentParser(
        prog="internvl serve",
        description="an OpenAI-compatible server for one model: that of transformers, with this package's model in it",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder or Hub repository of the original layout; none of its code is run")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=8000, help="(default: 8000)")
    parser.add_argument("--name", help="of the model in requests (default: the folder's, or the repository)")
    parser.add_argument(
        "--api-key-env", metavar="NAME", help="environment variable with the key that clients must send"
    )
    loading = parser.add_argument_group("loading")
    loading.add_argument(
        "--device", default="auto", help="cuda, cuda:1, cpu; auto: all that there are (default: auto)"
    )
    loading.add_argument("--dtype", default="auto", help="of the weights (default: auto, as stored)")
    loading.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    loading.add_argument("--token", help="access token for private repositories")
    loading.add_argument("--cache-dir", help="where downloads go")
    answers = parser.add_argument_group("requests and answers")
    answers.add_argument(
        "--max-num", type=int, metavar="TILES", help="most tiles of an image (default: the checkpoint's)"
    )
    answers.add_argument("--keep-markup", action="store_true", help="keep <ref>, <box> and <quad> in answers")
    answers.add_argument(
        "--split-reasoning", action="store_true", help="give thoughts as reasoning_content (around Qwen)"
    )
    answers.add_argument(
        "--allow-urls",
        metavar="HOSTS",
        help="fetch images from these hosts, divided by commas, or from every public address: public (default: none)",
    )
    answers.add_argument("--max-images", type=int, metavar="N", help="of a request (default: 64)")
    answers.add_argument("--max-body-mb", type=int, metavar="MB", help="size of a request (default: 64)")
    answers.add_argument(
        "--max-requests", type=int, default=32, metavar="N", help="connections at once; more get 503 (default: 32)"
    )
    return parser


def _serve(options: argparse.Namespace) -> int:
    from ..conversion.folders import resolve
    from ..serving.application import build_app, serving_parts

    serving_parts()  # before a model is loaded for nothing
    settings = read_settings(options)
    hub = {name: getattr(options, name) for name in ("revision", "token", "cache_dir") if getattr(options, name)}
    model, processor = load(resolve(options.model, **hub), options.device, options.dtype)
    app = build_app(model, processor, settings)
    import uvicorn

    shown = f"[{options.host}]" if ":" in options.host else options.host
    print(f"serving {settings.name} at http://{shown}:{options.port}/v1", file=sys.stderr, flush=True)
    config = uvicorn.Config(
        app, host=options.host, port=options.port, log_level="warning", limit_concurrency=options.max_requests
    )
    server = uvicorn.Server(config)
    try:
        server.run()
    except SystemExit as error:  # its own words are in the log, such as a port that is in use
        raise OSError(f"cannot serve at {shown}:{options.port}") from error
    return 0


def read_settings(options: argparse.Namespace) -> ServeSettings:
    """What the options say about requests and answers.

    Raises:
        ValueError: a number below 1, a host with a path or port, or no key in the environment.
    """
    from ..serving.settings import PUBLIC, ServeLimits, ServeSettings

    for name in ("max_num", "max_images", "max_body_mb", "max_requests"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    limits = {"images": options.max_images, "body_bytes": options.max_body_mb and options.max_body_mb * 2**20}
    hosts = tuple(host.strip().lower() for host in (options.allow_urls or "").split(",") if host.strip())
    for host in hosts:
        if "/" in host or host.count(":") == 1:
            raise ValueError(f"--allow-urls takes hosts such as images.example.com, or {PUBLIC}; got {host!r}")
    folder = Path(options.model)
    return ServeSettings(
        name=options.name or (folder.resolve().name if folder.is_dir() else options.model),
        max_tiles=options.max_num,
        keep_markup=options.keep_markup,
        split_reasoning=options.split_reasoning,
        url_hosts=hosts,
        api_key=_key(options.api_key_env),
        limits=ServeLimits(**{name: value for name, value in limits.items() if value is not None}),
    )


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise ValueError(f"--api-key-env: the environment has no {variable}")
    return os.environ[variable]


def load(folder: Path, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """The model, placed and in evaluation mode, and its processor.

    Raises:
        ValueError, OSError: the checkpoint cannot be loaded, or the device or dtype is unknown.
    """
    from ..modeling_internvl_chat import InternVLChatModel
    from ..processing_internvl import InternVLProcessor

    model: Any = InternVLChatModel.from_pretrained(folder, dtype=dtype, device_map=device)
    return model.eval(), InternVLProcessor.from_pretrained(folder)
