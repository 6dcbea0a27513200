"""What a visitor without a browser may send to the demo page: paths, addresses, others' keys, too much, leaving.

Needs Gradio; `make test-page` has it.
"""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")
httpx = pytest.importorskip("httpx")

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "examples" / "images"
SETTINGS = [6, 4, 32, 0, 1, 0, 1, ""]


class Wire:
    """A running page and its requests."""

    def __init__(self, url: str, page: Any, index: int, thinking: list[str]) -> None:
        self.url, self.page, self._index, self._thinking = f"{url}gradio_api", page, index, thinking

    def upload(self, path: Path) -> str:
        """Sends a file; returns its path on the server."""
        return self.send(path.read_bytes(), path.name).json()[0]

    def send(self, data: bytes, name: str = "a.bin") -> Any:
        """Sends bytes as a file; returns the response."""
        return httpx.post(f"{self.url}/upload", files={"files": (name, data)}, timeout=60)

    def ask(self, key: str, text: str, *paths: str) -> str:
        """Sends a question; returns all that the page said, as text."""
        files = [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in paths]
        body = self.body(key, text, files)
        httpx.post(f"{self.url}/queue/join", json=body, timeout=60).raise_for_status()
        said = []
        with httpx.stream("GET", f"{self.url}/queue/data", params={"session_hash": key}, timeout=120) as stream:
            for line in stream.iter_lines():
                said.append(line)
                if '"process_completed"' in line or '"close_stream"' in line:
                    break
        return "\n".join(said)

    def body(self, key: str, text: str, files: list[Any], turns: int | None = None) -> dict[str, Any]:
        data = [{"text": text, "files": files}, turns, *SETTINGS, *self._thinking]
        return {"data": data, "fn_index": self._index, "session_hash": key}


@pytest.fixture(scope="module")
def wire(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wire]:
    uploads = tmp_path_factory.mktemp("uploads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        from internvl_hub.app.page import Page, build, server_options
        from internvl_hub.app.page_command import CHECKPOINT, _load, build_parser
        from internvl_hub.app.page_limits import THINKING, can_think

        host = _load(str(CHECKPOINT), build_parser().parse_args([]))
        page = Page(host, uploads)
        blocks = build(page, "tiny")
        index = next(i for i, fn in blocks.fns.items() if fn.api_name == "ask")
        _, url, _ = blocks.launch(
            server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, ssr_mode=False, **server_options(page)
        )
        yield Wire(url, page, index, [next(iter(THINKING))] if can_think(host.model) else [])
        blocks.close()


def test_visitors_see_only_their_own(wire: Wire) -> None:
    first = wire.ask("first", "What is the number?", wire.upload(IMAGES / "number_4_wide.png"))
    second = wire.ask("second", "How many shapes are there?", wire.upload(IMAGES / "shapes.png"))
    assert "5433" in first and "shapes.png" not in first
    assert "shapes.png" in second and "number_4_wide" not in second and "5433" not in second
    names = {key: [m.name for m in wire.page.visitors.find(key).media] for key in ("first", "second")}
    assert names == {"first": ["number_4_wide.png"], "second": ["shapes.png"]}


@pytest.mark.parametrize("path", ["/etc/passwd", str(IMAGES / "shapes.png"), "../../etc/passwd"], ids=range(3))
def test_a_path_is_no_upload(wire: Wire, path: str) -> None:
    said = wire.ask("paths", "What is this?", path)
    assert "root:" not in said and '"success":false' in said.replace(" ", "")
    talk = wire.page.visitors.find("paths")
    assert talk is None or talk.media == []


@pytest.mark.parametrize(
    "path", ["/etc/passwd", str(ROOT / "pyproject.toml"), str(ROOT / "examples/images/shapes.png")]
)
def test_files_of_the_server_are_not_served(wire: Wire, path: str) -> None:
    assert httpx.get(f"{wire.url}/file={path}").status_code in (403, 404)


def test_an_address_is_not_fetched(wire: Wire) -> None:
    seen: list[str] = []

    class Trap(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802
            seen.append(self.path)
            self.send_response(404)
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

    server = HTTPServer(("127.0.0.1", 0), Trap)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    said = wire.ask("address", "What is this?", f"http://127.0.0.1:{server.server_port}/picture.png")
    server.shutdown()
    assert seen == [] and "Send the file itself" in said


def test_settings_beyond_the_sliders_are_refused(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SETTINGS", [6, 4, 10**9, 0, 1, 0, 1, ""])
    wire.ask("greedy", "What is 1+1?")
    talk = wire.page.visitors.find("greedy")
    assert talk is None or talk.exchanges == []


def test_answers_leave_escaped(wire: Wire) -> None:
    said = wire.ask("evil", "<script>alert(1)</script> <img src=x onerror=alert(1)>")
    texts = [line for line in said.splitlines() if "script" in line]
    assert texts and all("<script" not in json.dumps(line) and "<img" not in line for line in texts)


@pytest.mark.parametrize("path", ["run/ask", "run/ask/", "run/stop", "api/ask", "call/ask", "call/v2/ask"])
def test_questions_come_through_the_queue_alone(wire: Wire, path: str) -> None:
    reply = httpx.post(f"{wire.url}/{path}", json=wire.body("direct", "What is 1+1?", []), timeout=60)
    assert reply.status_code == 404 and wire.page.visitors.find("direct") is None


def test_refused_questions_drive_nobody_out(wire: Wire) -> None:
    wire.ask("victim", "What is the number?", wire.upload(IMAGES / "number_4_wide.png"))
    talk = wire.page.visitors.find("victim")
    fake = wire.send(b"no picture", "a.png").json()[0]
    before = len(wire.page.visitors)
    for number in range(wire.page.host.limits.conversations):
        assert '"success":true' in wire.ask(f"a{number}", " ").replace(" ", "")
        wire.ask(f"b{number}", "<image> What?")
        wire.ask(f"c{number}", "What?", fake)
    assert wire.page.visitors.find("victim") is talk and talk.media and len(wire.page.visitors) == before
    wire.page.visitors.close("victim")
    httpx.post(f"{wire.url}/queue/join", json=wire.body("victim", "And now?", [], turns=1), timeout=60)
    with httpx.stream("GET", f"{wire.url}/queue/data", params={"session_hash": "victim"}, timeout=120) as stream:
        said = "\n".join(line for line in stream.iter_lines())
    assert "after a long pause or to make room for others" in said


def test_uploads_are_counted_before_they_are_written(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    from internvl_hub.app.page_gate import UploadLimits

    def written() -> int:
        return sum(path.stat().st_size for path in wire.page.uploads.rglob("*") if path.is_file())

    replies, before = [], written()
    limits = UploadLimits(visitor_bytes=8 * 2**20)
    monkeypatch.setattr(wire.page.budget, "limits", limits)
    for number in range(6):
        replies.append(wire.send(bytes([number]) * 3 * 2**20))
    codes = [reply.status_code for reply in replies]
    assert codes[-1] == 413 and written() - before <= 8 * 2**20
    assert "no room for this upload" in replies[-1].text


def test_a_range_of_one_value_has_no_slider(wire: Wire, tmp_path: Path) -> None:
    from internvl_hub.app.page import Page, build
    from internvl_hub.app.page_chat import Host
    from internvl_hub.app.page_limits import ChatLimits
    from internvl_hub.app.page_media import MediaLimits

    host = Host(wire.page.host.model, wire.page.host.processor, ChatLimits(tiles=1, new_tokens=1))
    page = Page(host, tmp_path, MediaLimits(frames=1))
    blocks = build(page, "tiny")
    (ask,) = (fn for fn in blocks.fns.values() if fn.api_name == "ask")
    labels = [component.label for component in ask.inputs[2:]]
    assert labels[:5] == ["Temperature", "Top-p", "Top-k", "Repetition penalty", "System text"]
    assert len(labels) == len(page._names())


def test_closing_the_tab_frees_the_conversation(wire: Wire) -> None:
    wire.ask("leaver", "What is the number?", wire.upload(IMAGES / "number_4_wide.png"))
    talk = wire.page.visitors.find("leaver")
    assert talk is not None and talk.media
    with httpx.stream("GET", f"{wire.url}/heartbeat/leaver", timeout=30) as stream:
        next(stream.iter_lines())  # the tab is open; leaving the block closes it
    for _ in range(300):
        if wire.page.visitors.find("leaver") is None:
            break
        time.sleep(0.1)
    gc.collect()
    assert wire.page.visitors.find("leaver") is None and talk.closed and talk.media == []
