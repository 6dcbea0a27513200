"""Images of requests: data URLs and, from allowed hosts, addresses; under limits, and never a file of this machine.

Sizes are told by headers before anything is decoded. The address that was checked is the one that is connected to.

"""

from __future__ import annotations

import base64
import binascii
import http.client
import ipaddress
import socket
import ssl
import time
import urllib.request
from collections.abc import Sequence
from io import BytesIO
from typing import Any

from PIL import Image

from ..app.page_media import IMAGE_FORMATS
from ..tiling_internvl import ImageLoadError, load_image
from .settings import PUBLIC, Refused, ServeLimits


def data_url_bytes(url: str, name: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise Refused(f"{name}: a data URL must read data:image/png;base64,...")
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(f"{name}: invalid base64 ({error})") from None


def image_size(data: bytes, name: str, limits: ServeLimits) -> tuple[int, int]:
    """Width and height by the header; only formats that nothing but Pillow itself reads."""
    try:
        with Image.open(BytesIO(data), formats=IMAGE_FORMATS) as header:
            width, height = header.size
    except Image.DecompressionBombError:
        raise Refused(f"{name} has too many pixels; at most {limits.image_pixels:,} are taken", 413) from None
    except Exception:  # Pillow's readers raise many types on bad headers
        raise Refused(f"{name} is damaged, or none of {', '.join(IMAGE_FORMATS)}") from None
    if width * height > limits.image_pixels or max(width, height) > limits.side:
        raise Refused(
            f"{name} has {width} x {height} pixels; at most {limits.image_pixels:,} and sides of {limits.side} are "
            "taken",
            413,
        )
    return width, height


def decoded(data: bytes, name: str) -> Image.Image:
    try:
        return load_image(data)
    except ImageLoadError as error:
        raise Refused(f"{name}: {error.cause}") from None


def fetch(url: str, hosts: Sequence[str], most: int, seconds: float, name: str = "image") -> bytes:
    """What lies at an address; redirections are followed as far as they lead to allowed hosts.

    Args:
        url: `http://` or `https://`.
        hosts: Allowed hosts, or "public" for every address that is reachable by all.
        most: Bytes.
        seconds: For all of it.
        name: For messages.

    Raises:
        Refused: the host is not allowed, does not answer in time, or answers with something too large.
    """
    deadline = time.monotonic() + seconds
    handlers = [urllib.request.ProxyHandler({}), _Http(hosts), _Https(hosts)]
    opener = urllib.request.OpenerDirector()  # no file: and ftp: among its handlers
    for handler in (*handlers, urllib.request.HTTPRedirectHandler(), urllib.request.HTTPErrorProcessor(),
                    urllib.request.HTTPDefaultErrorHandler(), urllib.request.UnknownHandler()):  # fmt: skip
        opener.add_handler(handler)
    chunks, size = [], 0
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "internvl"})
        with opener.open(request, timeout=min(10.0, seconds)) as reply:
            while chunk := reply.read1(1 << 16):
                chunks.append(chunk)
                size += len(chunk)
                if size > most:
                    raise Refused(f"{name} has more than {most:,} bytes", 413)
                if time.monotonic() > deadline:
                    raise Refused(f"{name} could not be fetched within {seconds:g} s")
    except Refused:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Refused(f"{name} could not be fetched: {getattr(error, 'reason', None) or error}") from None
    return b"".join(chunks)


def _connect(host: str, port: int, hosts: Sequence[str], timeout: float | None) -> socket.socket:
    """A connection to an allowed host. The address that was checked is the one that is used."""
    named = host.lower().rstrip(".") in hosts
    if not named and PUBLIC not in hosts:
        raise OSError(f"host {host} is not allowed")
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if not named and not all(_is_public(str(entry[4][0])) for entry in found):
        raise OSError(f"host {host} has no public address")
    for i, (*_, address) in enumerate(found):
        try:
            return socket.create_connection((str(address[0]), port), timeout)
        except OSError:
            if i + 1 == len(found):
                raise
    raise OSError(f"host {host} has no address")


def _is_public(address: str) -> bool:
    number = ipaddress.ip_address(address.partition("%")[0])
    number = getattr(number, "ipv4_mapped", None) or number
    return number.is_global and not number.is_multicast


class _Http(urllib.request.HTTPHandler):
    """`http:` to allowed hosts."""

    def __init__(self, hosts: Sequence[str]) -> None:
        super().__init__()
        self.hosts = hosts

    def http_open(self, request: Any) -> Any:
        return self.do_open(lambda host, **options: _Connection(host, self.hosts, None, **options), request)


class _Https(urllib.request.HTTPSHandler):
    """`https:` to allowed hosts."""

    def __init__(self, hosts: Sequence[str]) -> None:
        super().__init__()
        self.hosts, self.tls = hosts, ssl.create_default_context()

    def https_open(self, request: Any) -> Any:
        return self.do_open(lambda host, **options: _Connection(host, self.hosts, self.tls, **options), request)


class _Connection(http.client.HTTPConnection):
    def __init__(self, host: str, hosts: Sequence[str], tls: ssl.SSLContext | None, **options: Any) -> None:
        if tls is not None:
            self.default_port = 443
        super().__init__(host, **options)
        self.hosts, self.tls = hosts, tls

    def connect(self) -> None:
        self.sock = _connect(self.host, self.port, self.hosts, self.timeout)
        if self.tls is not None:
            self.sock = self.tls.wrap_socket(self.sock, server_hostname=self.host)
