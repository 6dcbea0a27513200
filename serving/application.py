"""`transformers serve` around one `InternVLChatModel`: an OpenAI-compatible server for the original layout.

Handlers of chat completions and responses, streaming and the web application are those of transformers
(`transformers.cli.serving`); they get the model that is served here instead of one looked up among transformers'
classes. Around them: requests are checked, their images read under limits, and what would load other models, unload
this one or read files of this machine is left out. Nothing here renders prompts or generates.

That part of transformers is private: `build_app` says so where it has another shape. Tested with 5.11 and 5.23.
"""

from __future__ import annotations

import asyncio
import hmac
import importlib
import importlib.util
import inspect
import json
import logging
import time
from typing import Any

import transformers

from ..conversation import TemplateError, get_template
from ..processing_internvl import PromptTooLongError
from ..prompting_internvl import ImageCountError
from .request_sampling import read_logit_bias
from .requests import RequestReader
from .served_model import ServedModel, keep_markup
from .settings import Refused, ServeSettings

INSTALL = 'the server needs more packages: pip install "transformers[serving]"'
_ROUTES = ("/v1/chat/completions", "/v1/responses", "/v1/models", "/health")
_EXTRA = ("top_k", "chat_template_kwargs")  # of a request, beyond the fields that transformers lets through
_TESTED = "5.11 and 5.23"
_PARTS = {
    "utils": ("GenerationState", "Modality"),
    "model_manager": ("ModelManager",),
    "chat_completion": ("ChatCompletionHandler",),
    "response": ("ResponseHandler",),
    "server": ("build_server",),
}
logger = logging.getLogger(__name__)


class _OneModel:
    """Mixed into transformers' `ModelManager`: it has one model from the start, and neither loads nor unloads."""

    def __init__(self, name: str, model: ServedModel, processor: Any, modality: Any) -> None:
        self.hosted, self.modality, self.created = (model, processor), modality, int(time.time())
        super().__init__(device="cpu", force_model=name)  # type: ignore[call-arg]

    def process_model_name(self, model_id: str) -> str:
        """The name as it is; transformers adds a revision."""
        return model_id

    def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """The one model.

        Raises:
            Refused: another one is asked for.
        """
        name = self.force_model  # type: ignore[attr-defined]
        if model_id_and_revision != name:
            raise Refused(f"there is no model {model_id_and_revision!r:.80} here, only {name!r}", 404)
        return self.hosted

    def get_model_modality(self, model: Any, processor: Any = None) -> Any:
        """Text and images."""
        return self.modality

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """The one model; transformers lists what lies in the cache of this machine."""
        name = self.force_model  # type: ignore[attr-defined]
        return [{"id": name, "object": "model", "created": self.created, "owned_by": "internvl"}]


class _Guard:
    """Mixed into transformers' handlers: requests are checked before, and sampling is what OpenAI's fields say."""

    reader: RequestReader
    parsing: ServedModel
    vocabulary: int

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """As transformers'; what a request has wrong is `Refused`."""
        body = await asyncio.to_thread(self.reader.read, body)
        if "logit_bias" in body:
            body["logit_bias"] = read_logit_bias(body["logit_bias"], self.vocabulary)
        try:
            return await super().handle_request(body, request_id)  # type: ignore[misc]
        except (TemplateError, ImageCountError, PromptTooLongError) as error:
            raise Refused(str(error)) from error
        except ValueError as error:  # among them a tool call in the answer that is no JSON
            logger.exception("an answer failed")
            raise Refused(f"the answer could not be generated or read: {error}", 500) from error

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request({k: v for k, v in body.items() if k not in _EXTRA})  # type: ignore[misc]

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        name, model, processor = super()._resolve_model(body)  # type: ignore[misc]
        return name, self.parsing if body.get("tools") or self.reader.settings.split_reasoning else model, processor

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False
    ) -> Any:
        seedless = {key: value for key, value in body.items() if key != "seed"}
        config = super()._build_generation_config(seedless, model_generation_config, use_cb=use_cb)  # type: ignore[misc]
        config.request_seed = body.get("seed")
        if "temperature" in body:  # transformers draws only where the checkpoint's own settings do
            config.do_sample = body["temperature"] > 0
        if "top_k" in body:
            config.top_k = max(0, body["top_k"])
        if not config.do_sample:
            config.temperature = config.top_p = config.top_k = None
        return config


class _Gate:
    """Around the web application: requests without the key, or with too large a body, come no further."""

    def __init__(self, app: Any, key: str | None, body_bytes: int) -> None:
        self.app, self.key, self.body_bytes = app, None if key is None else f"Bearer {key}".encode(), body_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        given = headers.get(b"authorization", b"")
        if self.key is not None and scope["path"] != "/health" and not hmac.compare_digest(given, self.key):
            return await _reply(send, 401, "a key is needed: Authorization: Bearer ...")
        chunks, size = [], 0
        while True:  # whole, so that what is too large has been read to its end and the client sees the reply
            event = await receive()
            if event["type"] == "http.disconnect":
                return None
            size += len(event.get("body", b""))
            chunks.append(event.get("body", b"") if size <= self.body_bytes else b"")
            if size > 4 * self.body_bytes or not event.get("more_body"):
                break
        if size > self.body_bytes:
            return await _reply(send, 413, f"the request has more than {self.body_bytes:,} bytes")
        replies = iter([{"type": "http.request", "body": b"".join(chunks), "more_body": False}])

        async def replay() -> Any:
            return next(replies, None) or await receive()

        await self.app(scope, replay, send)


def error_body(message: str, status: int) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


async def _reply(send: Any, status: int, message: str) -> None:
    data = json.dumps(error_body(message, status)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})


def serving_parts() -> dict[str, Any]:
    """What is used of `transformers.cli.serving`, by name.

    Raises:
        ImportError: packages are missing, or this transformers has no such part.
    """
    if missing := [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]:
        raise ImportError(f"{INSTALL} (missing: {', '.join(missing)})")
    try:
        modules = {module: importlib.import_module(f"transformers.cli.serving.{module}") for module in _PARTS}
        return {name: getattr(modules[module], name) for module, names in _PARTS.items() for name in names}
    except (ImportError, AttributeError, NameError) as error:
        raise _another_shape(error) from error


def _another_shape(error: object) -> ImportError:
    return ImportError(
        f"the server of transformers {transformers.__version__} is not the one that this package was tested "
        f"with, that of {_TESTED}: {error}"
    )


def build_app(model: Any, processor: Any, settings: ServeSettings) -> Any:
    """The web application (FastAPI).

    Args:
        model: An `InternVLChatModel`; its configuration gets the id of `<IMG_CONTEXT>` where that is missing.
        processor: Its `InternVLProcessor`; its tokenizer is changed where `settings.keep_markup` says so.
        settings: How it is served.

    Raises:
        ImportError: see `serving_parts`; also where they cannot be put together.
    """
    parts = serving_parts()
    if settings.keep_markup:
        keep_markup(processor.tokenizer)
    served = ServedModel(model, processor)
    tools = get_template(processor.template).tools and model.config.get_text_config().model_type.startswith("qwen")
    guard = {
        "reader": RequestReader(processor, served.context, settings, tools),
        "parsing": ServedModel(model, processor, parses=True),
        "vocabulary": len(processor.tokenizer),
    }
    try:
        manager = type("OneModel", (_OneModel, parts["ModelManager"]), {})(
            settings.name, served, processor, parts["Modality"].VLM
        )
        state = parts["GenerationState"]()
        chat = type("Chat", (_Guard, parts["ChatCompletionHandler"]), guard)(manager, state)
        responses = type("Responses", (_Guard, parts["ResponseHandler"]), guard)(manager, state)
        given = {"model_manager": manager, "chat_handler": chat, "response_handler": responses}
        given |= {"generation_state": state, "enable_cors": False}
        # Handlers that are not given belong to routes that `_keep_routes` takes away.
        wanted = inspect.signature(parts["build_server"]).parameters
        app = parts["build_server"](**{name: given.get(name) for name in wanted})
        _keep_routes(app)
    except (TypeError, AttributeError) as error:
        raise _another_shape(error) from error
    app.add_exception_handler(Refused, _refusal)
    app.add_middleware(_Gate, key=settings.api_key, body_bytes=settings.limits.body_bytes)
    return app


def _keep_routes(app: Any) -> None:
    """Leaves what asks the one model; others load models, unload them, or have no use for this one."""
    app.router.routes[:] = [route for route in app.router.routes if route.path in _ROUTES]
    if missing := sorted(set(_ROUTES) - {route.path for route in app.router.routes}):
        raise AttributeError(f"no route {', '.join(missing)}")


async def _refusal(request: Any, error: Refused) -> Any:
    from fastapi.responses import JSONResponse

    return JSONResponse(error_body(str(error), error.status), error.status)
