"""`internvl serve`: answers over HTTP equal `model.chat`'s; hostile requests are refused and the server lives on."""

from __future__ import annotations

import asyncio
import base64
import http.server
import importlib.util
import io
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from documentation import block_run_by
from PIL import Image
from tiny import CHAT, CHECKPOINTS, QWEN2
from transformers import GenerationConfig

from internvl_hub.app import serve_command
from internvl_hub.evaluation.engines import Request, Sampling
from internvl_hub.evaluation.server_engine import ServerEngine
from internvl_hub.serving import application, request_images
from internvl_hub.serving.request_sampling import read_logit_bias
from internvl_hub.serving.requests import RequestReader
from internvl_hub.serving.served_model import ServedModel, keep_markup
from internvl_hub.serving.settings import PUBLIC, Refused, ServeLimits, ServeSettings

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "checkpoints" / "internvl-tiny"
EXAMPLES = ROOT / "examples" / "images"
TURNS = [
    (row["image"], turn[0])
    for row in json.loads((EXAMPLES / "questions.json").read_text(encoding="utf-8"))
    for turn in row["turns"]
]
FIND = ("shapes.png", next(question for file, question in TURNS if file == "shapes.png" and "<ref>" in question))
LIMITS = ServeLimits(
    body_bytes=400_000, images=3, image_bytes=100_000, image_pixels=200_000, pixels=300_000, side=1500, fetch_seconds=3
)
SETTINGS = ServeSettings("tiny", limits=LIMITS)

_MISSING = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]

try:  # 5.11 takes calls and thoughts out of answers in another way
    from transformers.cli.serving.utils import build_response_parser
except (ImportError, NameError):
    build_response_parser = None
PARSER = pytest.mark.skipif(build_response_parser is None, reason="this transformers reads answers another way")
SERVER = pytest.mark.skipif(bool(_MISSING), reason=f"transformers[serving] is needed: {', '.join(_MISSING)}")


# --------------------------------------------------------------------------------------------------------------- tools


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """The tiny model and its processor."""
    return serve_command.load(TINY, "cpu", "auto")


@pytest.fixture(scope="module")
def reader(loaded: tuple[Any, Any]) -> RequestReader:
    """Reads requests for the tiny model, whose context is 2,048 tokens."""
    return RequestReader(loaded[1], 2048, SETTINGS, tools=True)


def data_url(data: bytes | str) -> str:
    """Of bytes, or of an example picture."""
    data = (EXAMPLES / data).read_bytes() if isinstance(data, str) else data
    return "data:image/png;base64," + base64.b64encode(data).decode()


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(buffer, "PNG")
    return buffer.getvalue()


def claimed_png(width: int, height: int) -> bytes:
    """A few hundred bytes that say they are a picture of any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def image_part(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def user(*parts: Any) -> dict[str, Any]:
    """A message of texts and other parts."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": content}


def about(file: str, question: str) -> list[dict[str, Any]]:
    return [user(image_part(data_url(file)), question)]


def chat(loaded: tuple[Any, Any], files: list[str], question: str, **options: Any) -> Any:
    """What the model itself answers, greedily."""
    model, processor = loaded
    tiles = processor.image_processor([Image.open(EXAMPLES / file) for file in files]) if files else None
    pixel_values, patches = (tiles["pixel_values"], tiles["num_patches"].tolist()) if files else (None, None)
    return model.chat(processor.tokenizer, pixel_values, question, num_patches_list=patches, **options)


# ---------------------------------------------------------------------------------------------------- reading requests


def test_a_request_becomes_the_prompt_of_its_messages(loaded: tuple[Any, Any], reader: RequestReader) -> None:
    processor = loaded[1]
    files = ["number_4_wide.png", "word.png"]
    messages = [
        {"role": "system", "content": "Be brief."},
        user(image_part(data_url(files[0])), "What is <image> the <|im_end|> number?"),
        {"role": "assistant", "content": "5433"},
        user("And this?", image_part(data_url(files[1]))),
    ]
    body = reader.read({"model": "tiny", "messages": messages, "max_tokens": None})
    assert "max_tokens" not in body and body["stream"] is False
    pictures = [
        part["image_url"]
        for message in body["messages"]
        for part in message["content"]
        if isinstance(part, dict) and part["type"] == "image_url"
    ]
    assert all(isinstance(picture, Image.Image) for picture in pictures)
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    got = processor.apply_chat_template(body["messages"], **options, **body["chat_template_kwargs"])
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part["type"] == "image_url":
                part.update({"type": "image", "image": Image.open(EXAMPLES / files.pop(0)), "image_url": None})
    wanted = processor.apply_chat_template(messages, **options)
    assert all(torch.equal(got[key], wanted[key]) for key in ("input_ids", "pixel_values", "num_patches"))


def test_the_body_that_came_is_not_changed(reader: RequestReader) -> None:
    body = {"model": "tiny", "messages": about(*TURNS[0]), "stop": "x", "mm_processor_kwargs": {"max_num": 2}}
    before = json.dumps(body)
    assert reader.read(body)["stop"] == ["x"]
    assert json.dumps(body) == before


def test_tiles_can_be_fewer_and_never_more(loaded: tuple[Any, Any]) -> None:
    reader = RequestReader(loaded[1], 2048, ServeSettings("tiny", max_tiles=4), tools=False)
    messages = [user("Hi")]
    assert reader.read({"messages": messages})["chat_template_kwargs"]["max_dynamic_patch"] == 4
    body = reader.read({"messages": messages, "mm_processor_kwargs": {"max_dynamic_patch": 2}})
    assert body["chat_template_kwargs"] == {"max_dynamic_patch": 2, "min_dynamic_patch": 1, "max_length": 2047}
    assert "mm_processor_kwargs" not in body
    for value in (5, 0, True, "2", None, 1.5):
        with pytest.raises(Refused, match="from 1 to 4"):
            reader.read({"messages": messages, "mm_processor_kwargs": {"max_num": value}})


_EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n"
_URLS = {
    "a path": (str(EXAMPLES / "word.png"), "must be a data URL"),
    "a file URL": (f"file://{EXAMPLES / 'word.png'}", "must be a data URL"),
    "an address": ("http://127.0.0.1:9/a.png", "fetches no addresses"),
    "bare base64": (data_url("word.png").partition(",")[2], "must be a data URL"),
    "nothing": (None, "must be a data URL"),
    "a number": (7, "must be a data URL"),
    "broken base64": ("data:image/png;base64,@@@", "invalid base64"),
    "no base64": ("data:image/png,abc", "must read data:image"),
    "empty": ("data:image/png;base64,", "0 bytes"),
    "no image": (data_url(b"hello"), "damaged, or none of PNG"),
    "a truncated image": (data_url((EXAMPLES / "word.png").read_bytes()[:200]), "truncated"),
    "a format that runs programs": (data_url(_EPS), "damaged, or none of PNG"),
    "a bomb": (data_url(claimed_png(60_000, 60_000)), "pixels"),
    "too many pixels": (data_url(png(500, 500)), "at most 200,000"),
    "too long a side": (data_url(png(2000, 2)), "sides of 1500"),
    "too large a file": (data_url(bytes(100_001)), "100,001 bytes"),
}


@pytest.mark.parametrize("case", list(_URLS))
def test_images_that_are_refused(reader: RequestReader, case: str) -> None:
    url, words = _URLS[case]
    with pytest.raises(Refused, match=words) as refusal:
        reader.read({"messages": [user(image_part(url), "What is it?")]})
    assert str(EXAMPLES) not in str(refusal.value) and 400 <= refusal.value.status < 500


def test_images_are_counted_together(loaded: tuple[Any, Any], reader: RequestReader) -> None:
    with pytest.raises(Refused, match="4 images are too many"):
        reader.read({"messages": [user(*[image_part(data_url("word.png"))] * 4)]})
    with pytest.raises(Refused, match="320,000 pixels; at most 300,000"):
        reader.read({"messages": [user(*[image_part(data_url(png(400, 400)))] * 2)]})
    short = RequestReader(loaded[1], 40, SETTINGS, tools=False)
    with pytest.raises(Refused, match=r"3 tiles and 48 tokens, and the model has 40"):
        short.read({"messages": about(*TURNS[0])})


_CALL = {"function": {"name": "f", "arguments": "{}"}}
_BODIES = {
    "no messages": ({}, "messages must be a list"),
    "empty messages": ({"messages": []}, "not empty"),
    "a message that is text": ({"messages": ["hi"]}, "object with a role"),
    "a message without a role": ({"messages": [{"content": "hi"}]}, "object with a role"),
    "content of a number": ({"messages": [{"role": "user", "content": 3}]}, "content must be a list"),
    "a video": ({"messages": [user({"type": "video_url", "video_url": {"url": "/etc/passwd"}})]}, "frames"),
    "an image of another form": ({"messages": [user({"type": "image", "url": "/etc/passwd"})]}, "cannot be taken"),
    "a text that is none": ({"messages": [user({"type": "text", "text": None})]}, "cannot be taken"),
    "calls without arguments": (
        {"messages": [user("x"), {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]},
        "JSON object",
    ),
    "calls whose arguments are no JSON": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "JSON object",
    ),
    "a tool without a name": ({"messages": [user("x")], "tools": [{"type": "web_search"}]}, r"tools\[0\]"),
    "a template of one's own": (
        {"messages": [user("x")], "chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        "chat_template_kwargs may only have",
    ),
    "images for the template": (
        {"messages": [user("x")], "chat_template_kwargs": {"images": ["/etc/passwd"]}},
        "chat_template_kwargs may only have",
    ),
    "a limit for the template": (
        {"messages": [user("x")], "mm_processor_kwargs": {"max_pixels": None}},
        "mm_processor_kwargs may only have",
    ),
    "a generation config": ({"messages": [user("x")], "generation_config": "{}"}, "generation_config is not taken"),
    "temperature": ({"messages": [user("x")], "temperature": -1}, "temperature must be a number from 0 to 2"),
    "temperature as text": ({"messages": [user("x")], "temperature": "1"}, "temperature must be a number"),
    "temperature as nan": ({"messages": [user("x")], "temperature": float("nan")}, "temperature must be a number"),
    "top_p": ({"messages": [user("x")], "top_p": 0}, "top_p must be"),
    "no tokens": ({"messages": [user("x")], "max_tokens": 0}, "max_tokens must be a whole number from 1"),
    "half a token": ({"messages": [user("x")], "max_tokens": 1.5}, "max_tokens must be a whole number"),
    "a seed too large": ({"messages": [user("x")], "seed": 2**70}, "seed must be a whole number of 64 bits"),
    "stop": ({"messages": [user("x")], "stop": [""]}, "stop must be a text"),
    "stops": ({"messages": [user("x")], "stop": ["a"] * 17}, "17 texts"),
    "stream": ({"messages": [user("x")], "stream": "yes"}, "stream must be true or false"),
    "a format of answers": (
        {"messages": [user("x")], "response_format": {"type": "json_object"}},
        "response_format=.* is not supported",
    ),
    "a conversation that nobody keeps": ({"input": "x", "previous_response_id": "a"}, "previous_response_id"),
    "an item of no kind": ({"input": [{"type": "computer_call"}]}, "object with a role"),
    "an output that is no text": ({"input": [{"type": "function_call_output", "output": 3}]}, "must be a string"),
}


@pytest.mark.parametrize("case", list(_BODIES))
def test_requests_that_are_refused(reader: RequestReader, case: str) -> None:
    body, words = _BODIES[case]
    with pytest.raises(Refused, match=words):
        reader.read(body)


def test_requests_that_say_nothing_special_are_taken(reader: RequestReader) -> None:
    extra = {"response_format": {"type": "text"}, "tool_choice": "auto", "n": 1, "presence_penalty": 0, "user": "a"}
    assert reader.read({"messages": [user("x")], **extra})["user"] == "a"
    answer = {"role": "assistant", "content": "yes", "tool_calls": []}
    assert "tool_calls" not in reader.read({"messages": [user("x"), answer]})["messages"][1]
    body = reader.read({"messages": [user("x")], "tools": [_CALL], "tool_choice": "none"})
    assert "tools" not in body and "tool_choice" not in body


def test_tools_are_refused_where_the_model_knows_none(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(Refused, match="not trained on tool calls"):
        RequestReader(loaded[1], 2048, SETTINGS, tools=False).read({"messages": [user("x")], "tools": [_CALL]})


@pytest.mark.parametrize("bias", [{}, [], {"a": 1}, {"999": 1}, {"-1": 1}, {"1": "x"}, {"1": 101}], ids=str)
def test_a_bias_must_fit_the_vocabulary(bias: Any) -> None:
    with pytest.raises(Refused, match="below 704"):
        read_logit_bias(bias, 704)
    assert str(read_logit_bias({"5": -100, "703": 1.5}, 704)) == "{'5': -100.0, '703': 1.5}"


# ------------------------------------------------------------------------------------------------------------ fetching


@contextmanager
def website(pages: dict[str, Any]) -> Iterator[int]:
    """A web server on this machine; yields its port. A page is its bytes, an address to go to, or seconds to wait."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = pages[self.path]
            self.send_response(302 if isinstance(page, str) else 200)
            self.send_header("Location", page) if isinstance(page, str) else None
            self.end_headers()
            if isinstance(page, bytes):
                self.wfile.write(page)
            for _ in range(page if isinstance(page, int) else 0):
                time.sleep(0.05)
                self.wfile.write(b"x")
                self.wfile.flush()

        def log_message(self, *args: Any) -> None:
            pass

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:  # the client went away
                pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def test_addresses_are_fetched_from_named_hosts_alone() -> None:
    pages: dict[str, Any] = {"/a": b"abc", "/to-a": "/a", "/file": f"file://{EXAMPLES / 'word.png'}"}
    with website(pages) as port:
        site, hosts = f"http://127.0.0.1:{port}", ("127.0.0.1",)
        pages["/inside"] = f"http://localhost:{port}/a"
        assert (
            request_images.fetch(f"{site}/a", hosts, 3, 5)
            == request_images.fetch(f"{site}/to-a", hosts, 3, 5)
            == b"abc"
        )
        for path, words in [("/inside", "localhost is not allowed"), ("/file", "file")]:
            with pytest.raises(Refused, match=words):
                request_images.fetch(f"{site}{path}", hosts, 100, 5)
        with pytest.raises(Refused, match="more than 2 bytes"):
            request_images.fetch(f"{site}/a", hosts, 2, 5)
        with pytest.raises(Refused, match="no public address"):
            request_images.fetch(f"{site}/a", (PUBLIC,), 3, 5)
        with pytest.raises(Refused, match="not allowed"):
            request_images.fetch(f"{site}/a", ("example.com",), 3, 5)


def test_a_slow_address_is_given_up() -> None:
    with website({"/slow": 100}) as port, pytest.raises(Refused, match="within 0.3 s"):
        request_images.fetch(f"http://127.0.0.1:{port}/slow", ("127.0.0.1",), 1000, 0.3)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "10.1.2.3", "192.168.0.1", "169.254.169.254", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]",
     "[fe80::1]", "224.0.0.1", "2130706433", "127.1"],
)  # fmt: skip
def test_inner_addresses_are_not_public(host: str) -> None:
    with pytest.raises(Refused, match="no public address|could not be fetched"):
        request_images.fetch(f"http://{host}:9/", (PUBLIC,), 10, 1)


def test_the_address_that_is_checked_is_the_one_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["93.184.216.34", "127.0.0.1"])  # a name that changes its address between two questions
    used = []

    def lookup(*args: Any, **kwargs: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), 80))]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: used.append(address))
    request_images._connect("example.com", 80, (PUBLIC,), 1)
    assert used == [("93.184.216.34", 80)]


# ----------------------------------------------------------------------------------------------------------- the model


def test_a_served_model_stops_and_is_bounded(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    served = ServedModel(model, processor)
    assert served.generation_config.eos_token_id == [2] and served.generation_config.top_k == 0
    assert served.config.model_type == "internvl_chat"
    assert ServedModel(model, processor, parses=True).config.model_type == "qwen2"
    served.context = 12
    ids = torch.tensor([[20] * 9])
    config = GenerationConfig(max_new_tokens=50, eos_token_id=703, pad_token_id=0)
    output = served.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    assert output.shape[1] == 12 and config.max_new_tokens == 3


@pytest.mark.parametrize(
    "text", ["<x>final<y>42", "<x>fin", "42", "<x>final<y>"], ids=["all", "part", "none", "alone"]
)
def test_a_header_before_answers_is_dropped(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """As `model.chat` does for gpt-oss, whose models begin with their channel; whole and streamed."""
    tokenizer = loaded[1].tokenizer
    served = ServedModel(*loaded)
    served.header = tokenizer("<x>final<y>", add_special_tokens=False)["input_ids"]
    new, prompt = tokenizer(text, add_special_tokens=False)["input_ids"], torch.tensor([[7, 8, 9]])
    wanted = tokenizer(text.removeprefix("<x>final<y>"), add_special_tokens=False)["input_ids"]

    def generate(streamer: Any = None, **kwargs: Any) -> torch.Tensor:
        if streamer is not None:
            streamer.put(prompt[0])
            for token in new:
                streamer.put(torch.tensor([token]))
            streamer.end()
        return torch.cat([prompt, torch.tensor([new])], dim=1)

    monkeypatch.setattr(loaded[0], "generate", generate)
    config = GenerationConfig(max_new_tokens=50)
    output = served.generate(input_ids=prompt, generation_config=config)
    assert output[0].tolist() == [7, 8, 9, *wanted] and config.max_new_tokens == 50 - len(new) + len(wanted)
    seen: list[Any] = []
    streamer = SimpleNamespace(put=lambda value: seen.extend(value.tolist()), end=lambda: seen.append("end"))
    config = GenerationConfig(max_new_tokens=50)
    served.generate(input_ids=prompt, generation_config=config, streamer=streamer)
    assert seen == [7, 8, 9, *wanted, "end"] and config.max_new_tokens == 50 - len(new) + len(wanted)


def test_seeds_decide_what_is_drawn(loaded: tuple[Any, Any]) -> None:
    served = ServedModel(*loaded)
    ids = torch.tensor([[20] * 9])

    def draw(seed: int | None) -> list[int]:
        config = GenerationConfig(max_new_tokens=12, do_sample=True, top_k=0, temperature=3.0, pad_token_id=0)
        config.request_seed = seed
        options = {"attention_mask": torch.ones_like(ids), "generation_config": config}
        return served.generate(input_ids=ids, **options)[0].tolist()

    assert draw(1) == draw(1) != draw(2)


def test_kept_markup_changes_decoding_alone(loaded: tuple[Any, Any]) -> None:
    from internvl_hub.processing_internvl import InternVLProcessor

    plain, kept = loaded[1].tokenizer, InternVLProcessor.from_pretrained(TINY).tokenizer
    keep_markup(kept)
    text = "<ref>a cat</ref><box>[[1, 2]]</box><|im_end|>"
    ids = plain(text)["input_ids"]
    assert kept(text)["input_ids"] == ids
    assert plain.decode(ids, skip_special_tokens=True) == "a cat[[1, 2]]"
    assert kept.decode(ids, skip_special_tokens=True) == "<ref>a cat</ref><box>[[1, 2]]</box>"
    assert kept.decode(ids) == plain.decode(ids)


# --------------------------------------------------------------------------------------------------------- the command


def _settings(*arguments: str) -> ServeSettings:
    return serve_command.read_settings(serve_command.build_parser().parse_args(arguments))


def test_options(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _settings(str(TINY)) == ServeSettings("internvl-tiny")
    assert _settings("org/name").name == "org/name" and _settings("org/name", "--name", "a").name == "a"
    monkeypatch.setenv("SERVE_KEY", "secret")
    more = _settings("m", "--allow-urls", "A.example, b.example", "--max-body-mb", "2", "--api-key-env", "SERVE_KEY")
    assert more.url_hosts == ("a.example", "b.example") and more.api_key == "secret"
    assert more.limits == ServeLimits(body_bytes=2 * 2**20)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-num", "0"], "--max-num must be at least 1"),
        (["--allow-urls", "https://a.example"], "takes hosts"),
        (["--api-key-env", "INTERNVL_NO_SUCH_KEY"], "has no INTERNVL_NO_SUCH_KEY"),
    ],
    ids=["tiles", "hosts", "key"],
)
def test_options_that_are_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _settings("m", *arguments)


def test_missing_packages_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert serve_command.serve_main([str(TINY)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and 'pip install "transformers[serving]"' in said and "fastapi" in said


def test_another_server_inside_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(application, "_PARTS", {"no_such_module": ("Handler",)})
    with pytest.raises(ImportError, match="not the one that this package was tested with, that of 5.11 and 5.23"):
        application.serving_parts()


def test_the_gate_reads_no_more_than_it_may() -> None:
    taken: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        taken.append((await receive())["body"])

    async def ask(size: int, key: bytes) -> int | None:
        events = iter([{"type": "http.request", "body": b"x", "more_body": i + 1 < size} for i in range(size)])
        sent: list[dict[str, Any]] = []

        async def receive() -> Any:
            return next(events)

        async def send(event: dict[str, Any]) -> None:
            sent.append(event)

        scope = {"type": "http", "path": "/v1/models", "headers": [(b"authorization", key)]}
        await application._Gate(app, "secret", 10)(scope, receive, send)
        return sent[0]["status"] if sent else None

    assert asyncio.run(ask(10, b"Bearer secret")) is None and taken == [b"x" * 10]
    assert [asyncio.run(ask(size, b"Bearer secret")) for size in (11, 1000)] == [413, 413]
    assert [asyncio.run(ask(1, key)) for key in (b"", b"Bearer other", b"secret")] == [401, 401, 401]
    assert len(taken) == 1


# ---------------------------------------------------------------------------------------------------------- the server


@contextmanager
def running(loaded: tuple[Any, Any], settings: ServeSettings) -> Iterator[str]:
    """The server in a thread; yields its address."""
    import uvicorn

    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    app = application.build_app(*loaded, settings)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server ended"
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        listening.close()


@pytest.fixture(scope="module")
def address(loaded: tuple[Any, Any]) -> Iterator[str]:
    """A server with the limits of `LIMITS`."""
    with running(loaded, SETTINGS) as found:
        yield found


def client(address: str, key: str = "-") -> Any:
    openai = pytest.importorskip("openai", reason="the client of the protocol")
    return openai.OpenAI(base_url=address, api_key=key, max_retries=0)


def post(address: str, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    """Status and reply."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@SERVER
@pytest.mark.parametrize("place", range(len(TURNS)))
def test_answers_are_those_of_chat(address: str, loaded: tuple[Any, Any], place: int) -> None:
    file, question = TURNS[place]
    wanted = chat(loaded, [file], question)
    completions, messages = client(address).chat.completions, about(file, question)
    reply = completions.create(model="tiny", messages=messages, temperature=0)
    assert reply.choices[0].message.content == wanted and reply.choices[0].finish_reason == "stop"
    assert reply.model == "tiny"
    options = {"add_generation_prompt": True, "tokenize": True}
    pictures = [{"type": "image", "image": Image.open(EXAMPLES / file)}, {"type": "text", "text": question}]
    prompt = loaded[1].apply_chat_template([{"role": "user", "content": pictures}], **options)
    assert reply.usage.prompt_tokens == len(prompt)
    chunks = list(completions.create(model="tiny", messages=messages, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted
    assert chunks[-1].choices[0].finish_reason == "stop" and chunks[-1].usage == reply.usage
    assert len(chunks) > len(wanted) / 4 + 1


@SERVER
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_of_other_families(name: str) -> None:
    """Random weights around each language model, as released: stop tokens, first tokens and templates differ."""
    own = serve_command.load(CHAT / name, "cpu", "auto")
    picture, question = Image.new("RGB", (56, 56), "teal"), "What is it?"
    pixel_values = own[1].image_processor(picture)["pixel_values"]
    wanted = own[0].chat(own[1].tokenizer, pixel_values, question, {"max_new_tokens": 12, "do_sample": False})
    with running(own, ServeSettings("other")) as found:
        body = {"messages": [user(image_part(data_url(png(56, 56))), question)], "max_tokens": 12, "temperature": 0}
        status, reply = post(found, "/chat/completions", body)
        assert status == 200 and reply["choices"][0]["message"]["content"].strip() == wanted
        tools = {**body, "tools": [WEATHER]}
        assert post(found, "/chat/completions", tools)[0] == (200 if name == QWEN2 else 400)


@SERVER
def test_responses_are_those_of_chat(address: str, loaded: tuple[Any, Any]) -> None:
    file, question = TURNS[0]
    parts = [{"type": "input_image", "image_url": data_url(file)}, {"type": "input_text", "text": question}]
    wanted, responses = chat(loaded, [file], question), client(address).responses
    assert responses.create(model="tiny", input=[{"role": "user", "content": parts}]).output_text == wanted
    assert responses.create(model="tiny", input=parts).output_text == wanted
    events = list(responses.create(model="tiny", input=parts, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == wanted
    said = responses.create(model="tiny", input="How many?", instructions="Be brief.").output_text
    assert said == chat(loaded, [], "How many?", system="Be brief.")


@SERVER
def test_a_conversation_with_two_images_and_a_system_text(address: str, loaded: tuple[Any, Any]) -> None:
    files = ["number_4_wide.png", "shapes.png"]
    first = "<image>\nWhat is the number?"
    answer, history = chat(loaded, files[:1], first, return_history=True, system="Be brief.")
    second = "<image>\nHow many shapes are there?"
    wanted = chat(loaded, files, second, history=history, system="Be brief.")
    messages = [
        {"role": "system", "content": "Be brief."},
        user(image_part(data_url(files[0])), "What is the number?"),
        {"role": "assistant", "content": answer},
        user(image_part(data_url(files[1])), "How many shapes are there?"),
    ]
    reply = client(address).chat.completions.create(model="tiny", messages=messages)
    assert reply.choices[0].message.content == wanted


@SERVER
def test_clients_at_once_get_their_own_answers(address: str, loaded: tuple[Any, Any]) -> None:
    turns = TURNS[:6] * 2
    wanted = [chat(loaded, [file], question) for file, question in TURNS[:6]] * 2
    completions = client(address).chat.completions

    def ask(i: int) -> str:
        messages = about(*turns[i])
        if i % 2:
            pieces = completions.create(model="tiny", messages=messages, stream=True)
            return "".join(piece.choices[0].delta.content or "" for piece in pieces)
        return completions.create(model="tiny", messages=messages).choices[0].message.content

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(len(turns)))) == wanted
    assert len(set(wanted)) > 3


@SERVER
def test_lengths_stops_and_seeds(address: str) -> None:
    def ask(**options: Any) -> Any:
        return client(address).chat.completions.create(model="tiny", messages=about(*TURNS[0]), **options)

    cut = ask(max_tokens=2)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 2
    assert ask(max_tokens=10**6).choices[0].finish_reason == "stop"
    assert ask(stop=["43"]).choices[0].message.content == "543"  # transformers leaves the stop text in the answer
    assert ask(logit_bias={str(i): -100 for i in range(3, 704)}).usage.completion_tokens == 1
    drawn = {seed: [ask(temperature=2, seed=seed).choices[0].message.content for _ in range(2)] for seed in range(6)}
    assert all(first == second for first, second in drawn.values())
    assert len({first for first, _ in drawn.values()}) > 1
    narrow = {ask(temperature=2, seed=seed, extra_body={"top_k": 1}).choices[0].message.content for seed in range(4)}
    assert narrow == {"5433"}


@SERVER
def test_fewer_tiles_on_request(address: str) -> None:
    def tokens(**options: Any) -> int:
        reply = client(address).chat.completions.create(model="tiny", messages=about(*TURNS[0]), **options)
        return reply.usage.prompt_tokens

    assert tokens() - tokens(extra_body={"mm_processor_kwargs": {"max_dynamic_patch": 1}}) == 2 * 16


@SERVER
def test_markup_is_kept_on_request(loaded: tuple[Any, Any], address: str) -> None:
    from internvl_hub.processing_internvl import InternVLProcessor

    own = (loaded[0], InternVLProcessor.from_pretrained(TINY))
    wanted = chat(loaded, [FIND[0]], FIND[1], keep_markup=True)
    assert "<ref>" in wanted and "<box>" in wanted
    with running(own, ServeSettings("tiny", keep_markup=True)) as keeping:
        for stream in (False, True):
            reply = client(keeping).chat.completions.create(model="tiny", messages=about(*FIND), stream=stream)
            text = "".join(c.choices[0].delta.content or "" for c in reply) if stream else None
            assert (text if stream else reply.choices[0].message.content) == wanted
    reply = client(address).chat.completions.create(model="tiny", messages=about(*FIND))
    assert reply.choices[0].message.content == chat(loaded, [FIND[0]], FIND[1]) != wanted


@SERVER
def test_one_model_is_listed_and_asked(address: str) -> None:
    assert [model.id for model in client(address).models.list().data] == ["tiny"]
    assert post(address, "/chat/completions", {"messages": [user("Hi")]})[0] == 200
    for name in ("other", "gpt2", str(TINY), "tiny@main", "", "tiny:a.gguf", 7):
        status, reply = post(address, "/chat/completions", {"model": name, "messages": [user("Hi")]})
        assert status == 400 and "tiny" in str(reply)


@SERVER
@pytest.mark.parametrize(
    "path", ["/reset", "/load_model", "/v1/completions", "/v1/systemone", "/v1/audio/transcriptions", "/docs"]
)
def test_what_loads_unloads_or_shows_more_is_not_there(address: str, path: str) -> None:
    assert post(address.removesuffix("/v1"), path, {"model": "gpt2", "prompt": "x"})[0] == 404
    assert post(address, "/chat/completions", {"messages": [user("Hi")]})[0] == 200


@SERVER
@pytest.mark.parametrize("stream", [False, True])
def test_the_server_lives_on(address: str, stream: bool) -> None:
    """What is refused in general is tested above; here each way of refusing goes through the web application once."""
    urls = [_URLS[name][0] for name in ("a path", "a file URL", "an address", "broken base64", "a bomb", "no image")]
    bodies: list[Any] = [{"messages": [user(image_part(url), "x")]} for url in urls]
    bodies += [body for body, _ in _BODIES.values() if "nan" not in str(body).lower() and "input" not in body]
    bodies += [
        {"messages": [{"role": "assistant", "content": [image_part(data_url("word.png"))]}]},
        {"messages": [{"role": "nobody", "content": "x"}]},
        {"messages": [user("x"), {"role": "system", "content": "late"}]},
        {"messages": [user("word " * 3000)]},
        {"messages": [user("x")], "surprise": 1},
        {"messages": [user("x")], "logit_bias": {"99999": 1}},
    ]
    for body in bodies:
        body = {**body, "model": "tiny"}
        body.setdefault("stream", stream)
        status, reply = post(address, "/chat/completions", body)
        assert 400 <= status < 500, (body, reply)
    for data in (b"", b"{", b"[]", b"\xff\xfe", b"[" * 20_000, b'{"messages": ' + b"[" * 20_000):
        assert 400 <= post(address, "/chat/completions", data)[0] < 500
    assert post(address, "/chat/completions", {"messages": [user("x" * 10**6)]})[0] == 413
    assert post(address, "/responses", {"input": [{"type": "input_image", "image_url": "/etc/passwd"}]})[0] == 400
    reply = client(address).chat.completions.create(model="tiny", messages=about(*TURNS[0]))
    assert reply.choices[0].message.content == "5433"


@SERVER
def test_errors_have_openais_form(address: str) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="must be a data URL") as refusal:
        client(address).chat.completions.create(model="tiny", messages=[user(image_part("/etc/passwd"))])
    assert refusal.value.body["type"] == "invalid_request_error"


@SERVER
def test_a_key_is_asked_for(loaded: tuple[Any, Any]) -> None:
    import openai

    with running(loaded, ServeSettings("tiny", api_key="secret")) as found:
        with pytest.raises(openai.AuthenticationError):
            client(found).models.list()
        assert client(found, "secret").models.list().data[0].id == "tiny"
        assert urllib.request.urlopen(found.removesuffix("/v1") + "/health", timeout=10).status == 200


@SERVER
def test_addresses_are_fetched_where_allowed(loaded: tuple[Any, Any]) -> None:
    file, question = TURNS[0]
    pages = {"/a.png": (EXAMPLES / file).read_bytes(), "/b.png": b"no"}
    with website(pages) as port, running(loaded, ServeSettings("tiny", url_hosts=("127.0.0.1",))) as found:
        body = {"messages": [user(image_part(f"http://127.0.0.1:{port}/a.png"), question)]}
        assert post(found, "/chat/completions", body)[1]["choices"][0]["message"]["content"] == "5433"
        for url in (f"http://127.0.0.1:{port}/b.png", f"http://localhost:{port}/a.png", str(EXAMPLES / file)):
            assert post(found, "/chat/completions", {"messages": [user(image_part(url), question)]})[0] == 400


@SERVER
def test_the_evaluators_engine(address: str, loaded: tuple[Any, Any]) -> None:
    engine = ServerEngine(address, retries=0)
    assert (engine.name, engine.kind) == ("tiny", "internvl")
    requests = [Request(f"<image>\n{question}", images=(EXAMPLES / file,)) for file, question in TURNS[:4]]
    answers = engine.sample(requests, Sampling(max_new_tokens=64))
    assert [row[0].text for row in answers] == [chat(loaded, [file], question) for file, question in TURNS[:4]]
    (drawn,) = engine.sample(requests[3:], Sampling(n=4, temperature=2.0, max_new_tokens=16))
    assert len(drawn) == 4 and len({answer.text for answer in drawn}) > 1


# -------------------------------------------------------------------------------------------------------------- tools

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture
def writes(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the model write a text; returns the prompts that it saw."""

    def prepare(text: str) -> list[list[int]]:
        model, processor = loaded
        new, seen = processor.tokenizer(text)["input_ids"], []

        def generate(input_ids: torch.Tensor, streamer: Any = None, **kwargs: Any) -> torch.Tensor:
            seen.append(input_ids[0].tolist())
            if streamer is not None:
                streamer.put(input_ids[0])
                for token in new:
                    streamer.put(torch.tensor([token]))
                streamer.end()
            return torch.cat([input_ids, torch.tensor([new])], dim=1)

        monkeypatch.setattr(model, "generate", generate)
        return seen

    return prepare


@SERVER
@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls_there_and_back(address: str, loaded: tuple[Any, Any], writes: Any, stream: bool) -> None:
    seen = writes('Wait.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>')
    messages: list[Any] = [user("The weather in Oslo?")]
    reply = client(address).chat.completions.create(model="tiny", messages=messages, tools=[WEATHER], stream=stream)
    if stream:
        chunks = list(reply)
        finish = chunks[-1].choices[0].finish_reason
        (call,) = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    else:
        finish, (call,) = reply.choices[0].finish_reason, reply.choices[0].message.tool_calls
    assert finish == "tool_calls" and call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    processor = loaded[1]
    options = {"tools": [WEATHER], "add_generation_prompt": True, "tokenize": True}
    assert seen[0] == processor.apply_chat_template(messages, **options)
    function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    asked = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": function}],
    }
    messages += [asked, {"role": "tool", "tool_call_id": "1", "content": "rain"}]
    client(address).chat.completions.create(model="tiny", messages=messages, tools=[WEATHER])
    assert "<tool_response>\nrain\n</tool_response>" in processor.tokenizer.decode(seen[1])
    assert seen[1] == processor.apply_chat_template(messages, **options)


@SERVER
@PARSER
def test_a_broken_call_is_an_error_of_the_answer(address: str, writes: Any) -> None:
    import openai

    writes('<tool_call>\n{"name": "weather", \n</tool_call><|im_end|>')
    body = {"messages": [user("x")], "tools": [WEATHER]}
    status, reply = post(address, "/chat/completions", body)
    assert status == 500 and "as JSON" in reply["error"]["message"]
    with pytest.raises(openai.APIError):  # not an error of the client, as where the stream holds no JSON
        list(client(address).chat.completions.create(model="tiny", **body, stream=True))
    assert post(address, "/chat/completions", {"messages": [user("x")]})[0] == 200


@SERVER
@PARSER
def test_thoughts_are_split_off_on_request(loaded: tuple[Any, Any], address: str, writes: Any) -> None:
    writes("<think>\nhm\n</think>\n\n42<|im_end|>")
    message = post(address, "/chat/completions", {"messages": [user("x")]})[1]["choices"][0]["message"]
    assert message["content"] == "<think>\nhm\n</think>\n\n42"
    with running(loaded, ServeSettings("tiny", split_reasoning=True)) as found:
        message = post(found, "/chat/completions", {"messages": [user("x")]})[1]["choices"][0]["message"]
    assert message["content"].strip() == "42" and message["reasoning_content"].strip() == "hm"


# ---------------------------------------------------------------------------------------------------- as a program


@SERVER
def test_the_command_serves_until_it_is_told_to_end(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = "import sys; from internvl_hub.app.serve_command import serve_main; sys.exit(serve_main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(TINY), "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, stderr=log, env=environment)
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).read()
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.2)
        body = {"model": "internvl-tiny", "messages": about(*TURNS[0])}
        status, reply = post(f"http://127.0.0.1:{port}/v1", "/chat/completions", body)
        assert status == 200 and reply["choices"][0]["message"]["content"] == "5433"
    finally:
        server.terminate()
        server.wait(timeout=20)


@SERVER
def test_the_page_shows_how_to_ask(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The block of docs/serving.md, with the port of this server."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    block = block_run_by("tests/serving/test_serve.py", ROOT / "docs" / "serving.md")
    with running(loaded, ServeSettings("internvl-tiny")) as address:
        assert block.count("http://localhost:8000/v1") == 1
        exec(compile(block.replace("http://localhost:8000/v1", address), "docs/serving.md", "exec"), {})  # noqa: S102
    assert capsys.readouterr().out == "5433\n5433"


@SERVER
def test_a_port_that_is_taken_is_one_line(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve_command, "load", lambda *arguments: loaded)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert serve_command.serve_main([str(TINY), "--port", str(port)]) == 1
    assert f"internvl serve: cannot serve at 127.0.0.1:{port}" in capsys.readouterr().err
