"""A Hub on loopback, a client of it, and a small checkpoint."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import HfApi, constants

sys.path.append(str(Path(__file__).parent))  # for `from publishing_fakes import ...`

from publishing_fakes import CODE, DATA, TOKEN, write  # noqa: E402


@pytest.fixture
def code_root(tmp_path: Path) -> Path:
    return write(tmp_path / "code", CODE)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write(tmp_path / "checkpoint", DATA)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Two accounts, `user` and `other`; uploads in parts of 1,000 bytes."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with HubServer({TOKEN: "user", "token-of-other": "other"}, part_size=1000) as server:
        yield server


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=TOKEN)
