"""The server engine against a server on this machine that keeps what it is asked and answers well or badly."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from internvl_hub.data.records import Video
from internvl_hub.evaluation.engines import Answer, Failure, Request, Sampling
from internvl_hub.evaluation.server_engine import ServerEngine, ServerError

Reply = tuple[int, bytes] | tuple[int, bytes, dict[str, str]] | None  # None: the connection is dropped
GREEDY = Sampling(max_new_tokens=7)


class Server:
    """A server whose answers are `reply(body)`; `bodies` and `headers` are those of the requests, in order."""

    def __init__(self, owner: str = "vllm", models: Any = ("m",)) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.models = {"data": [{"id": name, "owned_by": owner} for name in models]}
        self.listing: Reply = (200, json.dumps(self.models).encode())
        self.reply: Callable[[dict[str, Any]], Reply] = lambda body: chat(["fine"] * body.get("n", 1))
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                assert self.path == "/v1/models"
                self.answer(outer.listing)

            def do_POST(self) -> None:
                assert self.path == "/v1/chat/completions"
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.bodies.append(body)
                outer.headers.append(dict(self.headers))
                self.answer(outer.reply(body))

            def answer(self, reply: Reply) -> None:
                if reply is None:
                    self.connection.close()
                    return
                status, data, *headers = reply
                self.send_response(status)
                for name, value in (headers[0] if headers else {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *arguments: Any) -> None:
                pass  # dropped connections are part of the tests

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def engine(self, **options: Any) -> ServerEngine:
        return ServerEngine(self.url, **{"retries": 2, "first_wait": 0.0, "timeout": 5.0, **options})


def chat(texts: list[Any], finish: str | None = "stop", **more: Any) -> Reply:
    choices = [{"message": {"role": "assistant", "content": text, **more}, "finish_reason": finish} for text in texts]
    return 200, json.dumps({"choices": choices}).encode()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def of_kind(server: Server, kind: str) -> ServerEngine:
    server.models = {"data": [{"id": "m", "owned_by": kind}]}
    server.listing = (200, json.dumps(server.models).encode())
    return server.engine()


def picture(folder: Path, kind: str = "png", **options: Any) -> Path:
    path = folder / f"picture.{kind}"
    Image.new("RGB", (6, 4), (200, 10, 10)).save(path, **options)
    return path


def decoded(url: str) -> tuple[str, bytes]:
    head, _, data = url.partition(";base64,")
    return head.removeprefix("data:"), base64.b64decode(data)


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_a_text_question(server: Server) -> None:
    sampling = Sampling(n=2, temperature=0.7, top_p=0.9, top_k=50, max_new_tokens=11, seed=4)
    assert server.engine(api_key="secret").sample([Request("Why?", system="Be brief.")], sampling) == [
        [Answer("fine"), Answer("fine")]
    ]
    assert server.bodies == [
        {
            "model": "m", "n": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 50, "max_tokens": 11, "seed": 4,
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
        }
    ]  # fmt: skip
    assert server.headers[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("kind", "top_k"), [("vllm", -1), ("sglang", -1), ("internvl", -1), ("lmdeploy", 0), ("x", None)]
)
def test_no_limit_on_tokens_in_every_dialect(server: Server, kind: str, top_k: int | None) -> None:
    of_kind(server, kind).sample([Request("Why?")], Sampling(temperature=1.0))
    assert server.bodies[0].get("top_k") == top_k
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize(("kind", "flags"), [("vllm", True), ("sglang", True), ("lmdeploy", False), ("x", True)])
def test_a_prefix_is_left_open(server: Server, kind: str, flags: bool) -> None:
    of_kind(server, kind).sample([Request("Why?", prefix="Because")], GREEDY)
    (body,) = server.bodies
    assert body["messages"][-1] == {"role": "assistant", "content": "Because"}
    assert body.get("continue_final_message", False) is flags and body.get("add_generation_prompt", True) is not flags


def test_a_server_that_cannot_go_on_is_not_asked(server: Server) -> None:
    (failure,) = of_kind(server, "internvl").sample([Request("Why?", prefix="Because")], GREEDY)
    assert isinstance(failure, Failure) and "does not go on" in failure.reason and not server.bodies


def test_pictures_stand_at_their_marks(server: Server, tmp_path: Path) -> None:
    file = picture(tmp_path)
    memory = Image.new("RGB", (3, 2), (1, 2, 3))
    request = Request("First <image>\nthen <image> and <image>?", (file, "http://x.org/a.png", memory))
    server.engine().sample([request], GREEDY)
    content = server.bodies[0]["messages"][0]["content"]
    assert [part.get("text") for part in content] == ["First ", None, "then ", None, " and ", None, "?"]
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    assert decoded(urls[0]) == ("image/png", file.read_bytes())
    assert urls[1] == "http://x.org/a.png"
    kind, data = decoded(urls[2])
    assert kind == "image/png" and Image.open(BytesIO(data)).tobytes() == memory.tobytes()


FILES = {"jpg": "image/jpeg", "webp": "image/webp", "gif": "image/gif", "bmp": None, "tiff": None}


@pytest.mark.parametrize("suffix", FILES)
def test_files_go_as_they_are_where_servers_can_read_them(server: Server, tmp_path: Path, suffix: str) -> None:
    file = picture(tmp_path, suffix)
    server.engine().sample([Request("<image>", (file,))], GREEDY)
    kind, data = decoded(server.bodies[0]["messages"][0]["content"][0]["image_url"]["url"])
    assert kind == (FILES[suffix] or "image/png") and (data == file.read_bytes()) == (FILES[suffix] is not None)
    assert Image.open(BytesIO(data)).size == (6, 4)


def test_a_turned_picture_goes_upright(server: Server, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = picture(tmp_path, "jpg", exif=exif)
    for upright, size in ((True, (4, 6)), (False, (6, 4))):
        server.engine(exif=upright).sample([Request("<image>", (file,))], GREEDY)
        _, data = decoded(server.bodies[-1]["messages"][0]["content"][0]["image_url"]["url"])
        assert Image.open(BytesIO(data)).size == size


def test_a_video_goes_as_its_frames(server: Server, tmp_path: Path) -> None:
    for i in range(5):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i}.png")
    of_kind(server, "lmdeploy").sample([Request("<video>\nWhat?", videos=(Video(tmp_path),), max_tiles=6)], GREEDY)
    content = server.bodies[0]["messages"][0]["content"]
    texts = [part["text"] for part in content if part["type"] == "text"]
    assert texts == ["Frame-1: ", "Frame-2: ", "Frame-3: ", "Frame-4: ", "Frame-5: ", "What?"]
    pictures = [part["image_url"] for part in content if part["type"] == "image_url"]
    assert [Image.open(BytesIO(decoded(p["url"])[1])).getpixel((0, 0))[0] for p in pictures] == [0, 1, 2, 3, 4]
    assert {p["max_dynamic_patch"] for p in pictures} == {1}


def test_tiles_are_told_in_every_dialect(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = picture(tmp_path)
    request = Request("<image><image>", (file, file), max_tiles=6)
    for kind in ("sglang", "lmdeploy"):
        of_kind(server, kind).sample([request], GREEDY)
        content = server.bodies[-1]["messages"][0]["content"]
        assert [part["image_url"]["max_dynamic_patch"] for part in content] == [3, 3]
    for kind in ("vllm", "internvl"):
        of_kind(server, kind).sample([request, Request("<image>", (file,))], GREEDY)
        told = sorted(str(body.get("mm_processor_kwargs")) for body in server.bodies[-2:])
        assert told == ["None", "{'max_dynamic_patch': 3}"] and not caplog.records
    engine = of_kind(server, "openai")
    engine.sample([request], GREEDY)
    engine.sample([request], GREEDY)
    assert "max_dynamic_patch" not in json.dumps(server.bodies[-1])
    assert ["max_tiles is not passed on" in record.message for record in caplog.records] == [True]


def test_vllm_cannot_tile_pictures_and_frames_differently(server: Server, tmp_path: Path) -> None:
    file = picture(tmp_path)
    both = Request("<image><video>", (file,), (Video((file,)),), max_tiles=6)
    one = Request("<image><video>", (file,), (Video((file,)),), max_tiles=1)
    refused, allowed = server.engine().sample([both, one], GREEDY)
    assert isinstance(refused, Failure) and "max_tiles=1" in refused.reason
    assert allowed == [Answer("fine")] and server.bodies[0]["mm_processor_kwargs"] == {"max_dynamic_patch": 1}


# --- what comes back -------------------------------------------------------------------------------------------------


def test_answers_keep_the_order_of_the_requests(server: Server) -> None:
    server.reply = lambda body: chat([body["messages"][0]["content"][::-1]])
    requests = [Request(f"q{i}") for i in range(20)]
    assert server.engine(concurrency=7).sample(requests, GREEDY) == [[Answer(f"q{i}"[::-1])] for i in range(20)]


def test_a_server_that_gives_one_answer_is_asked_again(server: Server) -> None:
    server.reply = lambda body: chat([f"seed {body['seed']}"])
    sampling = Sampling(n=3, temperature=1.0, seed=2**31 - 2)
    (answers,) = server.engine().sample([Request("?")], sampling)
    assert [answer.text for answer in answers] == ["seed 2147483646", "seed 2147483647", "seed 0"]
    assert [body["n"] for body in server.bodies] == [3, 2, 1]


def test_more_answers_than_asked_for_are_left_out(server: Server) -> None:
    server.reply = lambda body: chat(["a", "b", "c"])
    assert server.engine().sample([Request("?")], Sampling(n=2, temperature=1.0)) == [[Answer("a"), Answer("b")]]


FINISHES = {"stop": True, "length": False, "eos_token": True}


@pytest.mark.parametrize("finish", FINISHES)
def test_complete(server: Server, finish: str) -> None:
    server.reply = lambda body: chat([" a "], finish)
    assert server.engine().sample([Request("?")], GREEDY) == [[Answer(" a ", FINISHES[finish])]]


@pytest.mark.parametrize(("content", "text"), [("4", "<think>2+2</think>\n4"), (None, "<think>2+2")])
def test_thoughts_are_put_back(server: Server, content: str | None, text: str) -> None:
    server.reply = lambda body: chat([content], "length", reasoning_content="2+2")
    assert server.engine().sample([Request("?")], GREEDY) == [[Answer(text, False)]]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_servers_are_asked_again(server: Server, status: int) -> None:
    server.reply = lambda body: chat(["at last"]) if len(server.bodies) == 3 else (status, b"busy")
    assert server.engine().sample([Request("?")], GREEDY) == [[Answer("at last")]]
    server.bodies.clear()
    (failure,) = server.engine(retries=1).sample([Request("?")], GREEDY)
    assert isinstance(failure, Failure) and f"status {status}: busy (tried 2 times)" in failure.reason


def test_the_server_says_how_long_to_wait(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    engine = server.engine(first_wait=0.5, retries=4)
    monkeypatch.setattr("internvl_hub.evaluation.server_engine.time.sleep", waits.append)
    headers = [{}, {"Retry-After": "7"}, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, {"Retry-After": "900"}]
    server.reply = lambda body: (429, b"", headers[len(server.bodies) - 1]) if len(server.bodies) < 5 else chat(["a"])
    assert engine.sample([Request("?")], GREEDY) == [[Answer("a")]]
    assert waits == [0.5, 7.0, 2.0, 60.0]


REFUSALS = {
    "openai": b'{"error": {"message": "too long: 9000 tokens", "code": 400}}',
    "detail": b'{"detail": "too long: 9000 tokens"}',
    "message": b'{"object": "error", "message": "too long: 9000 tokens"}',
    "text": b"too long:\n 9000 tokens",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_a_failure_in_the_words_of_the_server(server: Server, name: str) -> None:
    server.reply = lambda body: (400, REFUSALS[name]) if "long" in str(body["messages"]) else chat(["fine"])
    long, short = server.engine().sample([Request("long"), Request("short")], GREEDY)
    assert isinstance(long, Failure) and long.reason.endswith("status 400: too long: 9000 tokens")
    assert short == [Answer("fine")] and len(server.bodies) == 2  # not asked again


HOSTILE: dict[str, Reply] = {
    "dropped": None,
    "empty": (200, b""),
    "html": (200, b"<html>hello</html>"),
    "not text": (200, b"\xff\xfe\x00"),
    "cut": (200, b'{"choices": ['),
    "deep": (200, b"[" * 100_000),
    "list": (200, b"[1]"),
    "number": (200, b"3"),
    "no choices": (200, b'{"choices": []}'),
    "null choices": (200, b'{"choices": null}'),
    "choices of text": (200, b'{"choices": "abc"}'),
    "null choice": (200, b'{"choices": [null]}'),
    "no message": (200, b'{"choices": [{"text": "a"}]}'),
    "null content": chat([None]),
    "content of parts": chat([[{"type": "text", "text": "a"}]]),
    "number content": chat([5]),
    "error": chat(["half an ans"], "error"),
    "teapot": (418, b'{"error": {"error": {"error": []}}}'),
    "deep words": (400, b"[" * 100_000),
    "empty refusal": (404, b""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_reply_ends_the_run(server: Server, name: str) -> None:
    server.reply = lambda body: HOSTILE[name] if body["messages"][0]["content"] == "bad" else chat(["fine"])
    results = server.engine(retries=1).sample([Request("a"), Request("bad"), Request("b")], GREEDY)
    assert results[0] == results[2] == [Answer("fine")]
    assert isinstance(results[1], Failure) and 10 < len(results[1].reason) < 600


def test_a_slow_server_is_given_up(server: Server) -> None:
    ready = threading.Event()
    server.reply = lambda body: chat(["late"]) if ready.wait(20) else None
    try:
        (failure,) = server.engine(timeout=0.05, retries=1).sample([Request("?")], GREEDY)
    finally:
        ready.set()
    assert isinstance(failure, Failure) and "timed out (tried 2 times)" in failure.reason


def test_media_that_cannot_be_read_are_not_asked_about(server: Server, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    requests = [Request("<image>", (tmp_path / "absent.png",)), Request("<image>", (broken,)), Request("<image>")]
    results = server.engine().sample(requests, GREEDY)
    for result, words in zip(results, ("absent.png", "broken.png", "1 <image> for 0"), strict=True):
        assert isinstance(result, Failure) and words in result.reason
    assert server.bodies == []


# --- which server ----------------------------------------------------------------------------------------------------


def test_the_only_model_is_found(server: Server) -> None:
    engine = server.engine()
    assert (engine.name, engine.kind) == ("m", "vllm")
    assert server.engine(model="another", kind="sglang").kind == "sglang"
    assert ServerEngine(server.url.removesuffix("/v1")).base_url == server.url


def test_several_models_need_a_name(server: Server) -> None:
    server.listing = (200, b'{"data": [{"id": "a"}, {"id": "b"}, {"nothing": 1}, 5]}')
    with pytest.raises(ValueError, match="has the models a, b; say which"):
        server.engine()
    assert server.engine(model="b").name == "b"


def test_a_server_that_lists_nothing(server: Server) -> None:
    server.listing = (404, b"no such page")
    assert (server.engine(model="m").name, server.engine(model="m").kind) == ("m", "other")
    with pytest.raises(ServerError, match="no such page"):
        server.engine()
    server.listing = (401, b"who are you?")
    with pytest.raises(ServerError, match="who are you"):
        server.engine(model="m")


def test_no_server(server: Server) -> None:
    url = server.url
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(ServerError, match="tried 2 times"):
        ServerEngine(url, retries=1, first_wait=0.0)


BAD = {
    "address": {"base_url": "localhost:8000"},
    "kind": {"kind": "tgi"},
    "concurrency": {"concurrency": 0},
    "retries": {"retries": -1},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    with pytest.raises(ValueError, match="base_url" if name == "address" else name):
        ServerEngine(**{"base_url": "http://127.0.0.1:9", **BAD[name]})
