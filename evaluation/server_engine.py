"""A server elsewhere as an `Engine`: OpenAI-compatible chat completions over HTTP.

What servers take beyond OpenAI's own fields, and how it is used here:

- `Sampling.top_k`: vLLM, SGLang and `internvl serve` take `top_k` with -1 for all; LMDeploy takes 0 for all, and 40 if
  there is none; others are only told of a limit.
- `Request.prefix`: the last message is the assistant's. LMDeploy continues it as it is; vLLM and SGLang need
  `continue_final_message` without `add_generation_prompt`, which others get too; `internvl serve` cannot do it.
- `Request.max_tiles`: `mm_processor_kwargs` of vLLM and `internvl serve`, `image_url.max_dynamic_patch` of SGLang and
  LMDeploy. Others are not told, and a warning says so.
- Several answers: `n`; where fewer come (LMDeploy gives one), the rest is asked for again with other seeds.

The server puts pictures into the prompt by its own chat template: some (vLLM with a template that takes plain text)
move them to the front. A request without a system text gets what the template has, which may be none.

The standard library does the talking: `huggingface_hub.InferenceClient` refuses any server, even one on this machine,
where `HF_HUB_OFFLINE` is set, as it is on most machines that evaluate.
"""

from __future__ import annotations

import http.client
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from .engines import Answer, Failure, Request, Sampling
from .request_media import DEFAULT_FRAMES
from .server_messages import KINDS, ReplyError, read_choices, request_body

_LONGEST_REPLY = 1 << 26
_LONGEST_WAIT = 60.0
_SHOWN = 300
_RETRIED = (408, 409, 425, 429)
_BROKEN = (urllib.error.URLError, http.client.HTTPException, OSError, ReplyError)  # URLError covers timeouts

logger = logging.getLogger(__name__)


class ServerError(OSError):
    """A server that could not be used; the message has its address and its own words, `status` its HTTP status."""

    status: int | None = None


class ServerEngine:
    """Answers from an OpenAI-compatible server; many requests are under way at once.

    Args:
        base_url: Such as `http://localhost:8000/v1`; `/v1` is added to an address without a path.
        model: Name of the model; None for the only one that the server has.
        api_key: Sent as a bearer token.
        concurrency: Requests that wait for the server at the same time.
        timeout: Seconds without a byte after which a try is given up; answers come whole, so as long as one takes.
        retries: Further tries after a status of 429 or 5xx, a timeout, a lost connection or a reply that is no json,
            each after twice the wait of the one before, or what `Retry-After` says, at most a minute.
        kind: One of `KINDS`; None for what the server's list of models says.
        num_frames: Frames of a video that does not say itself how many.
        exif: Turn pictures upright.
        first_wait: Seconds before the first further try.

    Raises:
        ServerError: the server does not answer, or does not let us in.
        ValueError: it has several models and none is named, or an unknown `kind`.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        api_key: str | None = None,
        concurrency: int = 8,
        timeout: float = 600.0,
        retries: int = 5,
        *,
        kind: str | None = None,
        num_frames: int = DEFAULT_FRAMES,
        exif: bool = True,
        first_wait: float = 1.0,
    ) -> None:
        address = urlsplit(base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(f"base_url={base_url!r} must be an address such as http://localhost:8000/v1")
        if kind not in (None, *KINDS):
            raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
        if concurrency < 1 or retries < 0:
            raise ValueError(f"need concurrency >= 1 and retries >= 0, got {concurrency} and {retries}")
        self.base_url = base_url.rstrip("/") if address.path.strip("/") else f"{base_url.rstrip('/')}/v1"
        self.concurrency, self.timeout, self.retries, self.first_wait = concurrency, timeout, retries, first_wait
        self.num_frames, self.exif = num_frames, exif
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        is_here = address.hostname == "localhost" or address.hostname.startswith("127.") or address.hostname == "::1"
        proxies = [urllib.request.ProxyHandler({})] if is_here else []
        self._opener = urllib.request.build_opener(*proxies)
        self.name, found = self._model(model)
        self.kind = kind or found
        self._warned = False

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Answer] | Failure]:
        """As `Engine.sample`; whether equal seeds give equal answers is up to the server."""
        if self.kind == "other" and not self._warned and any(request.max_tiles for request in requests):
            logger.warning("%s: max_tiles is not passed on, as the kind of server is not known", self.base_url)
            self._warned = True
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(lambda request: self._one(request, sampling), requests))

    def _one(self, request: Request, sampling: Sampling) -> list[Answer] | Failure:
        answers: list[Answer] = []
        try:
            body = request_body(request, self.name, self.kind, self.num_frames, self.exif)
            while len(answers) < sampling.n:  # a server may give fewer than it was asked for
                left = sampling.n - len(answers)
                asked = replace(sampling, n=left, seed=(sampling.seed + len(answers)) % 2**31)
                answers += self._choices({**body, **sampling_fields(asked, self.kind)})[:left]
        except (ValueError, OSError) as error:  # unreadable media, among others
            return Failure(str(error))
        return answers

    def _choices(self, body: dict[str, Any]) -> list[Answer]:
        """Answers of a reply; one that makes no sense is asked for again, as after an error of the server."""
        return self._call("chat/completions", json.dumps(body).encode(), read_choices)

    def _model(self, model: str | None) -> tuple[str, str]:
        """The model's name and the kind of server."""
        try:
            listed = self._call("models", None, _listed_models)
        except ServerError as error:
            if model is None or error.status in (401, 403):
                raise
            return model, "other"
        names = [entry["id"] for entry in listed]
        if model is None and len(names) != 1:
            raise ValueError(f"{self.base_url} has the models {', '.join(names) or '(none)'}; say which one")
        owners = {str(entry.get("owned_by")).lower() for entry in listed}
        return model or names[0], next((kind for kind in KINDS if kind in owners), "other")

    # ------------------------------------------------------------------------------------------------------------ http

    def _call(self, path: str, data: bytes | None, read: Any) -> Any:
        """What `read` makes of the decoded reply, after as many tries as are allowed.

        Raises:
            ServerError: no usable reply came.
        """
        url, wait = f"{self.base_url}/{path}", self.first_wait
        for further in range(self.retries, -1, -1):
            try:
                return read(self._fetch(urllib.request.Request(url, data, self._headers)))
            except urllib.error.HTTPError as error:
                problem = f"status {error.code}: {_words(error)}"
                asked_to_wait = _seconds(error.headers.get("Retry-After"))
                if error.code not in _RETRIED and error.code < 500:
                    refusal = ServerError(f"{url}: {problem}")
                    refusal.status = error.code
                    raise refusal from error
            except _BROKEN as error:
                problem, asked_to_wait = str(error) or type(error).__name__, None
            if further:
                time.sleep(min(_LONGEST_WAIT, wait if asked_to_wait is None else asked_to_wait))
                wait *= 2
        raise ServerError(f"{url}: {problem} (tried {self.retries + 1} times)")

    def _fetch(self, request: urllib.request.Request) -> Any:
        with self._opener.open(request, timeout=self.timeout) as reply:
            data = reply.read(_LONGEST_REPLY)
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ReplyError(f"the reply is no json: {data[:_SHOWN]!r}") from error


def sampling_fields(sampling: Sampling, kind: str) -> dict[str, Any]:
    """Fields of a request that say how answers are drawn."""
    fields: dict[str, Any] = {"max_tokens": sampling.max_new_tokens, "n": sampling.n, "seed": sampling.seed}
    fields |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
    everything = {"vllm": -1, "sglang": -1, "internvl": -1, "lmdeploy": 0}.get(kind)
    top_k = sampling.top_k or everything
    return fields if top_k is None else {**fields, "top_k": top_k}


def _listed_models(reply: Any) -> list[dict[str, Any]]:
    entries = reply.get("data") if isinstance(reply, dict) else None
    if not isinstance(entries, list):
        raise ReplyError(f"this is no list of models: {reply!r:.200}")
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]


def _words(error: urllib.error.HTTPError) -> str:
    """What the server says about an error."""
    try:
        text = error.read(_LONGEST_REPLY).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return str(error.reason)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    for key in ("error", "message", "detail"):
        value = value.get(key, value) if isinstance(value, dict) else value
    return (value if isinstance(value, str) else " ".join(text.split()) or str(error.reason))[:_SHOWN]


def _seconds(value: str | None) -> float | None:
    try:
        return max(0.0, float(value)) if value is not None else None
    except ValueError:  # a date
        return None
