"""Uploads of the demo page: what is read, and what a hostile visitor may try with files."""

from __future__ import annotations

import io
import os
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from internvl_hub.app.page_media import MediaLimits, UploadError, read_upload, shown_name

LIMITS = MediaLimits(image_bytes=200_000, image_pixels=1_000_000, side=4000, video_seconds=3.0, frames=6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The upload folder, with a secret beside it."""
    (tmp_path / "secret.png").write_bytes(_png(4, 4))
    (tmp_path / "uploads").mkdir()
    return tmp_path / "uploads"


def _png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(buffer, "PNG")
    return buffer.getvalue()


def _claimed_png(width: int, height: int) -> bytes:
    """A few hundred bytes that say they are a picture of any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _film(path: Path, frames: int = 20, rate: int = 10, size: tuple[int, int] = (64, 48)) -> Path:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mpeg4", rate=Fraction(rate))
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for index in range(frames):
            level = np.full((size[1], size[0], 3), 10 * index % 256, dtype=np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(level, format="rgb24")))
        output.mux(stream.encode())
    return path


def test_an_image_is_read_upright(folder: Path) -> None:
    image = Image.new("RGB", (30, 10), "white")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(folder / "photo.jpg", exif=exif)
    upload = read_upload(folder / "photo.jpg", folder, LIMITS)
    assert upload.pictures[0].size == (10, 30) and upload.pictures[0].mode == "RGB"
    assert upload.name == "photo.jpg" and not upload.is_video


def test_a_film_is_read_as_frames_in_order(folder: Path) -> None:
    upload = read_upload(_film(folder / "film.mp4"), folder, LIMITS, frames=4)
    levels = [np.asarray(frame).mean() for frame in upload.pictures]
    assert upload.is_video and levels == sorted(levels) and len(levels) == 4
    assert upload.seconds is not None and 0 < upload.seconds[0] < upload.seconds[-1] < 2.0
    assert len(read_upload(folder / "film.mp4", folder, LIMITS, frames=99).pictures) == LIMITS.frames


@pytest.mark.parametrize(
    "path",
    ["../secret.png", "x/../../secret.png", "/etc/passwd", "", ".", "..", "missing.png", "bad\0name.png", "~/x.png"],
    ids=["parent", "through", "passwd", "empty", "folder", "up", "missing", "nul", "home"],
)
def test_paths_outside_the_folder_are_refused_alike(folder: Path, path: str) -> None:
    with pytest.raises(UploadError, match=r"^This file is no upload of this page\.$"):
        read_upload(path, folder, LIMITS)


def test_absolute_path_of_a_neighbour_is_refused(folder: Path) -> None:
    with pytest.raises(UploadError, match="no upload"):
        read_upload(folder.parent / "secret.png", folder, LIMITS)


def test_links_are_refused(folder: Path) -> None:
    (folder / "own.png").write_bytes(_png(4, 4))
    (folder / "out.png").symlink_to(folder.parent / "secret.png")
    (folder / "in.png").symlink_to(folder / "own.png")
    (folder / "up").symlink_to(folder.parent, target_is_directory=True)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    for name in ("out.png", "in.png", "up/secret.png", "up/uploads/own.png", "loop.png"):
        with pytest.raises(UploadError, match="no upload"):
            read_upload(folder / name, folder, LIMITS)
    assert read_upload(folder / "own.png", folder, LIMITS).pictures[0].size == (4, 4)


def test_folder_behind_a_link_is_fine(folder: Path) -> None:
    (folder / "own.png").write_bytes(_png(4, 4))
    link = folder.parent / "link"
    link.symlink_to(folder, target_is_directory=True)
    assert read_upload(link / "own.png", link, LIMITS).pictures
    assert read_upload(folder / "own.png", link, LIMITS).pictures


def test_a_pipe_is_refused_without_waiting_for_it(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(UploadError, match="no upload"):
        read_upload(folder / "pipe.png", folder, LIMITS)


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [(100_000, 100_000, "too many"), (3000, 3000, "too many"), (4001, 1, "too long"), (1, 4001, "too long")],
    ids=["bomb", "pixels", "wide", "tall"],
)
def test_bombs_are_refused_by_their_header(folder: Path, width: int, height: int, message: str) -> None:
    (folder / "bomb.png").write_bytes(_claimed_png(width, height))
    with pytest.raises(UploadError, match=message):
        read_upload(folder / "bomb.png", folder, LIMITS)


def test_large_and_empty_files_are_refused(folder: Path) -> None:
    (folder / "large.png").write_bytes(_png(4, 4) + bytes(LIMITS.image_bytes))
    (folder / "empty.png").touch()
    (folder / "empty.mp4").touch()
    for name, message in (("large.png", r"0\.2 MB"), ("empty.png", "empty"), ("empty.mp4", "empty")):
        with pytest.raises(UploadError, match=message):
            read_upload(folder / name, folder, LIMITS)


@pytest.mark.parametrize("name", ["page.html", "code.svg", "script.js", "picture", "a.png.exe", "doc.pdf", "x.eps"])
def test_other_kinds_of_file_are_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes(_png(4, 4))
    with pytest.raises(UploadError, match="only images"):
        read_upload(folder / name, folder, LIMITS)


@pytest.mark.parametrize(
    "content",
    [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\x89PNG"],
    ids=["postscript", "svg", "cut"],
)
def test_images_are_told_by_their_content(folder: Path, content: bytes) -> None:
    (folder / "picture.png").write_bytes(content)
    with pytest.raises(UploadError, match="no image of a known format"):
        read_upload(folder / "picture.png", folder, LIMITS)


def test_a_damaged_image_is_refused(folder: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / "photo.png")
    (folder / "photo.png").write_bytes((folder / "photo.png").read_bytes()[:2000])
    with pytest.raises(UploadError, match="damaged or truncated"):
        read_upload(folder / "photo.png", folder, LIMITS)


def test_a_playlist_cannot_name_other_files(folder: Path) -> None:
    """FFmpeg follows lists of files, whatever they are called: this one shows another visitor's film."""
    av = pytest.importorskip("av")
    _film(folder / "private.mkv")
    (folder / "list.mp4").write_text("ffconcat version 1.0\nfile private.mkv\n")
    with av.open(f"file:{folder / 'list.mp4'}", options={"protocol_whitelist": "file"}) as opened:
        assert opened.streams.video, "the attack works where nothing stops it"
    for name, text in (("list.mp4", None), ("list.mkv", "#EXTM3U\n#EXTINF:2,\nfile:///etc/passwd\n")):
        if text is not None:
            (folder / name).write_text(text)
        with pytest.raises(UploadError, match="no film of a known format"):
            read_upload(folder / name, folder, LIMITS)


def test_long_and_large_films_are_refused(folder: Path) -> None:
    with pytest.raises(UploadError, match="it lasts 5 s"):
        read_upload(_film(folder / "long.mp4", frames=50), folder, LIMITS)
    small = MediaLimits(frame_pixels=1000)
    with pytest.raises(UploadError, match="frames of 64 x 48 pixels"):
        read_upload(_film(folder / "film.mp4"), folder, small)
    with pytest.raises(UploadError, match="too many; at most"):
        read_upload(folder / "film.mp4", folder, MediaLimits(video_bytes=100))


def test_a_damaged_film_names_no_place_on_the_server(folder: Path) -> None:
    pytest.importorskip("av")
    (folder / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(300))
    with pytest.raises(UploadError) as error:
        read_upload(folder / "film.mp4", folder, LIMITS)
    assert str(folder) not in str(error.value) and str(error.value).startswith("film.mp4: ")


def test_names_are_short_and_printable() -> None:
    assert shown_name("a/b\\c/<b>x</b>.png") == "b>.png"
    assert shown_name("/etc/x\n\x1b[31m\u202ey.png") == "x  [31m y.png"
    assert len(shown_name("x" * 5000 + ".png")) < 61
