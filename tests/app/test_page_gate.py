"""What the demo page's server takes: addresses, lengths, bytes of uploads, and when they are deleted."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pytest

from internvl_hub.app import page_gate
from internvl_hub.app.page_command import page_main
from internvl_hub.app.page_gate import Gate, UploadBudget, UploadLimits

MB = 2**20
LIMITS = UploadLimits(total_bytes=10 * MB, visitor_bytes=6 * MB, seconds=100)


class App:
    """What stands behind the gate: notes the paths that it is asked for, and waits where it is told to."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.wait: asyncio.Event | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked.append(scope["path"])
        message = {"more_body": True}
        while message.get("more_body"):
            message = await receive()
        if self.wait is not None:
            await self.wait.wait()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


async def request(
    gate: Gate, path: str, size: int | None = 0, visitor: str = "a", sends: int | None = None, **more: Any
) -> int:
    """The status that a request of `size` bytes gets; of which only `sends` come, in two parts, if that is given."""
    sent: list[Any] = []
    body = bytes((size or 0) if sends is None else sends)
    parts = [body[: len(body) // 2], body[len(body) // 2 :]]
    headers = [] if size is None else [(b"content-length", str(size).encode())]
    scope = {
        "type": "http", "method": "POST", "path": path, "client": (visitor, 1), **more,
        "headers": [*headers, *more.get("headers", [])],
    }  # fmt: skip

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        if not parts:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts) or sends is not None}

    await gate(scope, receive, send)
    return sent[0]["status"]


def status(gate: Gate, path: str, size: int | None = 0, visitor: str = "a", **more: Any) -> int:
    return asyncio.run(request(gate, path, size, visitor, **more))


UPLOAD = "/gradio_api/upload"


@pytest.mark.parametrize("path", ["queue/join", "upload", "upload/", "run/stop", "cancel", "reset/"])
def test_addresses_of_the_page_are_open(path: str, tmp_path: Path) -> None:
    app = App()
    assert status(Gate(app, tmp_path, UploadBudget(LIMITS)), f"/gradio_api/{path}") == 200 and len(app.asked) == 1


@pytest.mark.parametrize(
    "path", ["call/ask", "call/v2/ask", "api/ask", "process_recording", "component_server/", "stream/x", "vibe-edit"]
)
def test_other_addresses_are_closed(path: str, tmp_path: Path) -> None:
    app = App()
    gate = Gate(app, tmp_path, UploadBudget(LIMITS))
    assert status(gate, f"/gradio_api/{path}") == 404 and app.asked == []
    assert status(gate, f"/gradio_api/{path}", method="GET") == 200


def test_a_length_must_be_said_and_kept(tmp_path: Path) -> None:
    app = App()
    gate = Gate(app, tmp_path, UploadBudget(LIMITS))
    chunked = [(b"transfer-encoding", b"chunked")]
    for path in (UPLOAD, "/gradio_api/queue/join"):
        assert status(gate, path, None) == status(gate, path, 5, headers=chunked) == 411
    assert status(gate, "/gradio_api/queue/join", MB + 1) == 413 and app.asked == []


def test_nobody_uploads_more_than_a_share_and_all_no_more_than_the_folder(tmp_path: Path) -> None:
    gate = Gate(App(), tmp_path, UploadBudget(LIMITS))
    assert [status(gate, UPLOAD, 4 * MB), status(gate, UPLOAD, 4 * MB), status(gate, UPLOAD, 2 * MB)] == [
        200,
        413,
        200,
    ]
    assert [status(gate, UPLOAD, 5 * MB, "b"), status(gate, UPLOAD, 4 * MB, "b")] == [413, 200]
    assert status(gate, UPLOAD, 1, "c") == 413, "the folder is full"


def test_uploads_under_way_count(tmp_path: Path) -> None:
    async def two_at_once() -> tuple[int, int]:
        app = App()
        gate = Gate(app, tmp_path, UploadBudget(LIMITS))
        app.wait = asyncio.Event()
        first = asyncio.create_task(request(gate, UPLOAD, 4 * MB))
        await asyncio.sleep(0)
        second = await request(gate, UPLOAD, 4 * MB)
        app.wait.set()
        return await first, second

    assert asyncio.run(two_at_once()) == (200, 413)


def test_announced_bytes_that_never_come_take_no_room(tmp_path: Path) -> None:
    gate = Gate(App(), tmp_path, UploadBudget(LIMITS))
    for sends in (0, 2 * MB):
        with pytest.raises(ConnectionError):
            status(gate, UPLOAD, 4 * MB, sends=sends)
    assert [status(gate, UPLOAD, 5 * MB), status(gate, UPLOAD, 4 * MB)] == [413, 200]


def test_room_that_is_gone_meanwhile_ends_the_upload(tmp_path: Path) -> None:
    budget = UploadBudget(LIMITS)

    async def crowded(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "http.request"
        assert budget.take("a", 4 * MB)
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 500, "headers": []})

    assert status(Gate(crowded, tmp_path, budget), UPLOAD, 4 * MB) == 500
    assert budget.has_room("a", 0) and not budget.has_room("a", 1)


def test_an_upload_counts_until_it_is_surely_deleted() -> None:
    now = [0.0]
    budget = UploadBudget(LIMITS, clock=lambda: now[0])
    assert budget.take("a", 6 * MB)
    now[0] = 1e6
    assert not budget.take("a", MB), "it has not ended"
    budget.end("a", 6 * MB)
    now[0] += LIMITS.seconds
    assert not budget.take("a", MB)
    now[0] += 61
    assert budget.take("a", 6 * MB)


def test_tiny_uploads_count_too(tmp_path: Path) -> None:
    gate = Gate(App(), tmp_path, UploadBudget(LIMITS))
    assert [status(gate, UPLOAD, 1) for _ in range(7)] == [200] * 6 + [413]


def test_old_uploads_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = tmp_path / "shown"
    names = ["example/a.png", "old/b.png", "tmpleft", "mixed/old.png", "mixed/new.png", "shown/c.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / names[0]).touch()
    gate = Gate(App(), tmp_path, UploadBudget(LIMITS), (shown,))
    for name in names[1:]:
        (tmp_path / name).touch()
    for name in names:
        if "new" not in name:
            os.utime(tmp_path / name, (0, time.time() - LIMITS.seconds - 1))
    status(gate, "/", method="GET")
    assert all((tmp_path / name).exists() for name in names), "not at every request"
    monkeypatch.setattr(page_gate, "_SWEEP_SECONDS", 0.0)
    status(gate, "/", method="GET")
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"example/a.png", "mixed/new.png", "shown/c.png"} and not (tmp_path / "old").exists()


@pytest.mark.parametrize(
    "options",
    ["--port 99999", "--port 0", "--port x", "--max-tiles 0", "--max-tiles 1.5", "--max-frames 0", "--max-frames 65",
     "--max-new-tokens -5", "--max-conversations 0"],
)  # fmt: skip
def test_numbers_out_of_range_are_refused_at_once(options: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        page_main(options.split())
    name, value = options.split()
    assert ended.value.code == 2
    assert f"argument {name}: must be a whole number from 1 to" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda:99", "banana", "meta"])
def test_a_device_that_cannot_be_used_is_named(device: str) -> None:
    from internvl_hub.app.page_command import CHECKPOINT, _load, build_parser

    with pytest.raises(ValueError, match=f"--device {device} cannot be used here: .+"):
        _load(str(CHECKPOINT), build_parser().parse_args(["--device", device]))
