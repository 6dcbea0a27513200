"""Annotation files: the offset index against plain splitting, and that reading survives pickling and forking."""

import hashlib
import io
import json
import multiprocessing
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from internvl_hub.data.annotations import AnnotationFile, RecordError, index_lines

# Mostly line ends and white space, so that blank lines and chunk borders of every kind come up.
contents = st.lists(
    st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\r", b" ", b"\t", b" \n", b"a", b"{}", b"\xef\xbb\xbf", b"\x00\xff"]),
    max_size=12,
).map(b"".join)


@settings(max_examples=150, deadline=None)
@given(data=contents, chunk_bytes=st.integers(1, 9))
@example(data=b"\xef\xbb\xbf", chunk_bytes=4)
@example(data=b"a\n \n" * 5, chunk_bytes=2)
def test_index_equals_splitting(data: bytes, chunk_bytes: int) -> None:
    offsets, kept = index_lines(io.BytesIO(data), chunk_bytes=chunk_bytes)
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    lines = lines if lines[-1] else lines[:-1]
    assert [data[a:b].removesuffix(b"\n") for a, b in zip(offsets, offsets[1:], strict=False)] == lines
    expected = [i for i, line in enumerate(lines) if line.strip()]
    assert (list(range(len(lines))) if kept is None else kept.tolist()) == expected
    assert (kept is None) == (len(expected) == len(lines))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("last", [True, False])
def test_rows_and_line_numbers(tmp_path: Path, end: str, mark: str, last: bool) -> None:
    path = tmp_path / "rows.jsonl"
    lines = ["", '{"a": 1}', "  ", ' {"b": "é\\n"}', "", "[3]"]
    path.write_bytes((mark + end.join(lines) + end * last).encode())
    file = AnnotationFile(path)
    assert list(file) == [{"a": 1}, {"b": "é\n"}, [3]]
    assert [file.line(i) for i in range(3)] == [2, 4, 6]
    assert file.where(1) == f"{path}:4"
    assert (file[-1], file.line(-3)) == ([3], 2)
    for row in (3, -4):
        with pytest.raises(IndexError, match="of 3"):
            file[row]


def test_index_of_many_chunks_reads_every_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"i": i, "text": "x" * (i * 37 % 100)} for i in range(500)]
    path.write_text("".join(json.dumps(row) + "\n" * (1 + (i % 7 == 0)) for i, row in enumerate(rows)))
    with path.open("rb", buffering=0) as file:
        small, large = index_lines(file, chunk_bytes=64), None
    with path.open("rb", buffering=0) as file:
        large = index_lines(file)
    assert all((a == b).all() for a, b in zip(small, large, strict=True))
    assert list(AnnotationFile(path)) == rows


def test_json_list_is_the_same_sequence(tmp_path: Path) -> None:
    rows = [{"a": "é", "b": [1, 2.5, None, True]}, "text", {"nested": {"x": {}}}]
    path = tmp_path / "rows.JSON"
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")
    file = AnnotationFile(path)
    assert list(file) == rows
    assert list(pickle.loads(pickle.dumps(file))) == rows
    assert file.where(-1) == f"{path}[2]"


def test_empty_files(tmp_path: Path) -> None:
    for name, text in (("a.jsonl", ""), ("b.jsonl", "\n \n"), ("c.json", "[]")):
        (tmp_path / name).write_text(text)
        assert list(AnnotationFile(tmp_path / name)) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", r"suffix is '\.csv'; use an uncompressed \.jsonl or \.json file"),
        ("a.jsonl.gz", b"", r"suffix is '\.gz'"),
        ("a.jsonl", "{}".encode("utf-16"), "UTF-16; save it as UTF-8"),
        ("a.json", b"{}", "must hold a list of rows, got dict"),
        ("a.json", b"{}\n{}\n", r"not valid json.*ends with \.jsonl"),
        ("a.json", b"[" * 100_000, "not valid json"),
    ],
)
def test_what_is_no_annotation_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordError, match=message) as caught:
        AnnotationFile(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))


def test_bad_lines_are_errors_when_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"[\n" + b'{"a": "\xff"}\n' + b"[" * 100_000 + b"\n1")
    file = AnnotationFile(path)
    assert file[3] == 1
    for row in range(3):
        with pytest.raises(RecordError, match=rf"rows\.jsonl:{row + 1}: not valid json") as caught:
            file[row]
        assert ("ends with .json" in str(caught.value)) == (row == 0)


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    content = b'{"a": 1}\n' * 1000
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "c.jsonl").write_bytes(content[:-2] + b" \n")
    prints = [AnnotationFile(tmp_path / name).fingerprint() for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    assert prints[0] == prints[1] == hashlib.blake2b(content, digest_size=16).hexdigest()
    assert prints[2] != prints[0]


def test_pickling_after_reading(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("1\n\n2\n")
    file = AnnotationFile(path)
    assert file[1] == 2  # the file is open now
    copy = pickle.loads(pickle.dumps(file))
    file.close()
    assert list(copy) == [1, 2]
    assert list(file) == [1, 2]


def _read(file: AnnotationFile, rows: range, results: object) -> None:
    results.put([file[row] for row in rows])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_processes_share_one_open_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{i}\n" for i in range(400)))
    file = AnnotationFile(path)
    assert file[0] == 0
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    workers = [context.Process(target=_read, args=(file, range(i, 400, 2), results)) for i in range(2)]
    for worker in workers:
        worker.start()
    found = sorted(results.get() + results.get())
    for worker in workers:
        worker.join()
    assert found == list(range(400))


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("1\n2\n")
    file = AnnotationFile(path)
    path.write_text("11\n2\n")
    for use in (lambda: file[0], file.fingerprint):
        with pytest.raises(RecordError, match="has changed"):
            use()
