"""`internvl eval` on the tiny checkpoint, and what it says of arguments that do not work."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from internvl_hub.app.cli import main
from internvl_hub.app.engine_options import weights_digest
from internvl_hub.evaluation.presets import PRESETS


@pytest.fixture
def tiny(root: Path) -> str:
    return str(root / "checkpoints" / "internvl-tiny")


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Four questions, of which the second needs a picture and the last has one that is absent."""
    Image.new("RGB", (64, 64), "white").save(tmp_path / "white.png")
    rows = [
        {"question": "2+2=?", "answer": 4, "category": "sums"},
        {"question": "Is there a red circle?", "image": "white.png", "answer": "No", "category": "pictures"},
        {"question": "Who are you?", "answer": "I am InternVL-tiny.", "category": "talk"},
        {"question": "What color?", "image": "absent.png", "answer": "red", "category": "pictures"},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def report(folder: Path) -> dict:
    content = json.loads((folder / "report.json").read_text())
    content.pop("seconds")
    return content


def test_evaluates_and_goes_on(tiny: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", tiny, data, "--images", str(tmp_path), "--output", str(tmp_path / "out"), "--batch-size", "2"]
    command += ["--max-new-tokens", "24", "--device", "cpu"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "4 questions scored; 1 failed" in printed and "absent.png" in printed
    content = report(tmp_path / "out")
    assert content["model"] == tiny and content["settings"]["weights"] == weights_digest(Path(tiny))
    assert content["score"] >= 0.5 and content["settings"]["sampling"]["max_new_tokens"] == 24
    answers = tmp_path / "out" / "answers-00000-of-00001.jsonl"
    whole = answers.read_bytes()
    answers.write_bytes(whole[: len(whole) - 20])
    assert main(command) == 0
    assert answers.read_bytes() == whole and report(tmp_path / "out") == content
    answers.write_bytes(whole.replace(b'"error"', b'"answers": [{"text": "red", "complete": true}], "was"'))
    assert main([*command, "--report-only"]) == 0
    assert report(tmp_path / "out")["score"] == content["score"] + 0.25
    capsys.readouterr()
    assert main([*command, "--max-tiles", "2"]) == 1
    assert "preset.max_tiles: None there, 2 now" in capsys.readouterr().err


def test_shards(tiny: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["eval", tiny, data, "--images", str(tmp_path), "--batch-size", "1", "--samples", "2", "--device", "cpu"]
    common += ["--max-new-tokens", "8"]
    assert main([*common, "--output", str(tmp_path / "whole")]) == 0
    assert main([*common, "--output", str(tmp_path / "parts"), "--shard", "1/2"]) == 0
    printed = capsys.readouterr().out
    assert "shard 1/2 is done; 2 questions wait" in printed and not (tmp_path / "parts" / "report.json").exists()
    assert main([*common, "--output", str(tmp_path / "parts"), "--shard", "0/2"]) == 0
    assert report(tmp_path / "parts") == report(tmp_path / "whole")
    assert report(tmp_path / "whole")["samples"]["count"] == 2


def test_a_server(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply({"data": [{"id": "served", "owned_by": "vllm"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = json.dumps(body["messages"])
            content = "No" if "image/png" in asked and body["top_k"] == -1 else "I am InternVL-tiny."
            self.reply({"choices": [{"message": {"content": content}, "finish_reason": "stop"}]})

        def reply(self, content: dict) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        command = ["eval", "auto", data, "--images", str(tmp_path), "--output", str(tmp_path / "out")]
        assert main([*command, "--server", url]) == 0
    finally:
        server.shutdown()
        server.server_close()
    content = report(tmp_path / "out")
    assert (content["model"], content["score"], content["settings"]["backend"]) == ("served", 0.5, "vllm")
    assert [entry["key"] for entry in content["failures"]] == ["data:4"]


def test_lists_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(re.search(rf"^{name} ", printed, re.MULTILINE) for name in PRESETS)


def test_reasoning_changes_the_limits(tiny: str, data: str, tmp_path: Path) -> None:
    more = ["--cot", "boxed", "--max-new-tokens", "4", "--limit", "1", "--device", "cpu"]
    assert main(["eval", tiny, data, "--output", str(tmp_path / "out"), *more]) == 0
    content = report(tmp_path / "out")
    assert content["preset"]["style"] == "boxed" and content["questions"]["scored"] == 1
    assert [entry["problem"] for entry in content["unreadable"]] == ["no_box"]


BAD = {
    "no data": (["m"], "name a model and a data file"),
    "preset": (["m", "DATA", "--preset", "docvqb"], "no preset 'docvqb'"),
    "metric": (["m", "DATA", "--metric", "bleu"], "no metric 'bleu'"),
    "limit": (["m", "DATA", "--limit", "0"], "--limit must be at least 1"),
    "absent data": (["m", "absent.jsonl"], "absent.jsonl"),
    "absent model": (["no/such/model", "DATA"], "no folder here"),
    "field": (["m", "DATA", "--preset", "mmvp", "--report-only"], "holds no answers"),
    "key": (["m", "DATA", "--server", "http://127.0.0.1:9", "--api-key-env", "NO_SUCH_KEY"], "no NO_SUCH_KEY"),
    "server": (["m", "DATA", "--server", "127.0.0.1:9"], "must be an address"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_done_is_one_line(
    name: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = BAD[name]
    given = [data if argument == "DATA" else argument for argument in arguments]
    assert main(["eval", *given, "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("internvl eval: ") and message in error[-1]


def test_a_shard_must_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for shard in ("4/4", "1", "a/b"):
        with pytest.raises(SystemExit):
            main(["eval", "m", "d.jsonl", "--shard", shard])
        assert "such as 0/4" in capsys.readouterr().err


def test_the_digest_of_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    content = bytearray(1 << 18)
    digests = set()
    for place in (None, 0, 1 << 17, -1):
        changed = bytearray(content)
        if place is not None:
            changed[place] = 1
        path.write_bytes(changed)
        digests.add(weights_digest(tmp_path))
    assert len(digests) == 3  # the beginning, which is a header, is not looked at
