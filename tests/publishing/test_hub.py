"""Uploads to a Hub on loopback: one commit, private, repeatable, and never half visible."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_server import Blob, HubServer
from huggingface_hub import HfApi, ModelCard
from publishing_fakes import CODE, DATA, TOKEN, weights, write

from internvl_hub.publishing.hub import ConflictError, UploadError
from internvl_hub.upload_to_hub import push

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = {*CODE, *DATA, "README.md", ".gitattributes"}
WEIGHTS = hashlib.sha256(DATA["model.safetensors"].encode()).hexdigest()


@pytest.fixture
def upload(checkpoint: Path, code_root: Path, api: HfApi) -> Any:
    """`push` of the checkpoint to user/name."""
    return lambda **options: push(checkpoint, "user/name", code_root=code_root, api=api, **options)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's pauses between attempts."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


def _shas(hub: HubServer) -> list[str]:
    return list(hub.repositories["user/name"].commits)


def test_one_commit_to_a_private_repository(hub: HubServer, upload: Any, checkpoint: Path) -> None:
    done = upload(commit_message="first")
    repository = hub.repositories["user/name"]
    assert repository.private and _shas(hub)[1:] == [done.commit] and repository.messages[done.commit] == "first"
    files = hub.files("user/name")
    assert set(files) == PUBLISHED and {str(name) for name in done.files} == PUBLISHED - {".gitattributes"}
    assert files["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    assert hub.uploads == {WEIGHTS: 1} and ("POST", f"/complete/{WEIGHTS}") in hub.requests
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["checkpoint", "code"]


def test_public_where_asked(hub: HubServer, upload: Any) -> None:
    upload(private=False)
    assert not hub.repositories["user/name"].private


def test_public_repository_stays_public_and_this_is_said(
    hub: HubServer, upload: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    upload(private=False)
    upload()
    assert not hub.repositories["user/name"].private and "user/name is public" in capsys.readouterr().out


def test_same_again_commits_nothing(hub: HubServer, upload: Any) -> None:
    first = upload()
    again = upload()
    assert first.changed and first.summary == f"committed: {first.url}"
    assert not again.changed and again.summary.startswith(
        f"nothing to commit: all of it is there already, at {hub.endpoint}"
    )
    assert again.commit == first.commit and hub.uploads == {WEIGHTS: 1} and len(_shas(hub)) == 2


def test_dry_run_sends_nothing(
    hub: HubServer, upload: Any, capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    write(checkpoint, {".env": "x", "optimizer.pt": "x"})
    done = upload(dry_run=True)
    assert hub.requests == [] and done.commit is None and {*map(str, done.files)} == PUBLISHED - {".gitattributes"}
    text = capsys.readouterr().out
    assert "          3,200  model.safetensors\n" in text and "left out: '.env', 'optimizer.pt'" in text


# Interruptions


def test_cut_connection_is_tried_again(hub: HubServer, upload: Any) -> None:
    hub.cuts = 1
    upload()
    assert set(hub.files("user/name")) == PUBLISHED and hub.cuts == 0


def test_broken_upload_shows_nothing_and_goes_on(hub: HubServer, upload: Any, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    shards = {f"model-0000{i}-of-00002.safetensors": weights(f"shard {i} " * 300, str(i)) for i in (1, 2)}
    index = json.dumps({"weight_map": dict(zip("12", shards, strict=True))})
    write(checkpoint, {**shards, "model.safetensors.index.json": index})
    first = hashlib.sha256(shards["model-00001-of-00002.safetensors"].encode()).hexdigest()
    hub.objects[first] = shards["model-00001-of-00002.safetensors"].encode()  # arrived before the line broke
    hub.cuts = 1000
    with pytest.raises(UploadError, match="Nothing of it is visible"):
        upload()
    assert set(hub.files("user/name")) == {".gitattributes"}
    hub.cuts = 0
    upload()
    assert {*shards, "config.json"} < set(hub.files("user/name"))
    assert first not in hub.uploads and sum(hub.uploads.values()) == 1


def test_killed_upload_goes_on(hub: HubServer, checkpoint: Path, code_root: Path) -> None:
    """The plain script, without package and torch, killed while a part of the weights is on its way."""
    for name in ("upload_to_hub.py", "publishing"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, code_root / name)
    block = "import sys, runpy; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'internvl_hub'])); "
    run = f"{block}sys.argv = sys.argv[1:]; sys.path.insert(0, {str(code_root)!r}); "
    run += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", run, str(code_root / "upload_to_hub.py"), str(checkpoint), "--repo", "user/name"]
    hub_variables = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment = {**os.environ, **hub_variables}
    hub.hold.set()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert hub.held.wait(120), process.communicate()[1].decode()[-2000:]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert set(hub.files("user/name")) == {".gitattributes"} and not hub.objects
    hub.hold.clear()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "committed: http" in done.stdout, done.stderr
    assert set(hub.files("user/name")) == PUBLISHED and len(_shas(hub)) == 2


def test_lost_answer_to_a_commit(hub: HubServer, upload: Any) -> None:
    hub.lost = {"commit"}
    with pytest.raises(
        UploadError, match="The main branch has moved to [0-9a-f]{12}, so the commit is probably there"
    ):
        upload()
    assert set(hub.files("user/name")) == PUBLISHED
    assert not upload().changed and len(_shas(hub)) == 2


def test_lost_answer_to_a_pull_request(hub: HubServer, upload: Any) -> None:
    hub.lost = {"commit"}
    with pytest.raises(UploadError, match="A pull request may be open: look at http://.*/user/name/discussions"):
        upload(create_pr=True)


def test_server_that_is_gone_after_the_commit(hub: HubServer, upload: Any) -> None:
    hub.before_commit = lambda: setattr(hub, "down", True)
    with pytest.raises(UploadError, match="Whether the commit is there could not be found out"):
        upload()


def test_connection_that_breaks_before_the_commit_arrives(
    hub: HubServer, upload: Any, api: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("the line is cut")

    monkeypatch.setattr(api, "create_commit", refuse)
    with pytest.raises(UploadError, match="Nothing of it is visible"):
        upload()
    assert set(hub.files("user/name")) == {".gitattributes"}


def test_tag_that_fails_after_the_commit(
    hub: HubServer, upload: Any, api: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("the line is cut")

    with monkeypatch.context() as patch, pytest.raises(UploadError, match="complete, but the tag 'v1' could not be"):
        patch.setattr(api, "create_tag", refuse)
        upload(tag="v1")
    assert set(hub.files("user/name")) == PUBLISHED
    done = upload(tag="v1")
    assert hub.repositories["user/name"].refs["v1"] == done.commit and len(_shas(hub)) == 2


def test_lost_answer_to_a_tag_is_no_failure(hub: HubServer, upload: Any) -> None:
    hub.lost = {"tag"}
    assert upload(tag="v1").commit == hub.repositories["user/name"].refs["v1"]


# Conflicts


def _other_commit(hub: HubServer) -> str:
    repository = hub.repositories["user/name"]
    files = {**repository.commits[repository.refs["main"]], "notes.txt": Blob(1, b"x")}
    return repository.commit(files, "main", "by someone else")


def test_commit_of_someone_else_during_the_upload(hub: HubServer, upload: Any) -> None:
    hub.before_commit = lambda: _other_commit(hub)
    with pytest.raises(ConflictError, match="user/name has changed: its main branch is at .* Nothing was committed"):
        upload()
    assert set(hub.files("user/name")) == {".gitattributes", "notes.txt"}
    upload()
    assert set(hub.files("user/name")) == {*PUBLISHED, "notes.txt"} and hub.uploads == {WEIGHTS: 1}


def test_given_parent_must_be_the_head(hub: HubServer, upload: Any) -> None:
    first = upload().commit
    other = _other_commit(hub)
    hub.requests.clear()
    for parent in (first, "", "main"):
        with pytest.raises(ConflictError, match=f"is at {other[:12]}, not at"):
            upload(parent_commit=parent, evaluations=())
    assert not any("preupload" in path for _, path in hub.requests)
    upload(parent_commit=other[:10])


def test_existing_tag_is_refused_before_anything_is_sent(hub: HubServer, upload: Any, checkpoint: Path) -> None:
    upload(tag="v1")
    hub.requests.clear()
    (checkpoint / "model.safetensors").write_text(weights("other"))
    with pytest.raises(ConflictError, match="already has a tag 'v1'"):
        upload(tag="v1")
    assert not any("preupload" in path for _, path in hub.requests)


# Branches, pull requests, tags, later pushes


def test_pull_request_leaves_the_branch_alone(hub: HubServer, upload: Any, checkpoint: Path) -> None:
    before = upload().commit
    (checkpoint / "model.safetensors").write_text(weights("better"))
    done = upload(create_pr=True)
    assert hub.repositories["user/name"].refs["main"] == before
    assert done.pull_request == f"{hub.endpoint}/user/name/discussions/1"
    assert hub.files("user/name", "refs/pr/1")["model.safetensors"].endswith(b"better")
    with pytest.raises(ValueError, match="exclude one another"):
        upload(create_pr=True, tag="v1")


def test_pull_request_of_nothing_is_none(hub: HubServer, upload: Any) -> None:
    upload()
    done = upload(create_pr=True)
    assert done.summary.startswith("nothing to commit") and done.pull_request is None
    assert set(hub.repositories["user/name"].refs) == {"main"}


def test_former_adapter_goes(hub: HubServer, upload: Any, api: HfApi) -> None:
    """Transformers would load the adapter's base model instead of the weights."""
    api.create_repo("user/name")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        api.upload_file(path_or_fileobj=b"{}", path_in_repo=name, repo_id="user/name")
    assert upload().deleted == ("adapter_config.json", "adapter_model.safetensors")
    assert set(hub.files("user/name")) == PUBLISHED


def test_branch_and_tag(hub: HubServer, upload: Any) -> None:
    done = upload(revision="next", tag="v2")
    refs = hub.repositories["user/name"].refs
    assert refs["next"] == refs["v2"] == done.commit != refs["main"]
    assert set(hub.files("user/name")) == {".gitattributes"}


def test_what_this_checkpoint_lacks_goes_with_the_same_commit(hub: HubServer, upload: Any, checkpoint: Path) -> None:
    write(checkpoint, {"chat_template.jinja": "old"})
    upload()
    _other_commit(hub)
    (checkpoint / "chat_template.jinja").unlink()
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    write(checkpoint, {"model.safetensors.index.json": json.dumps(index)})
    done = upload()
    assert done.deleted == ("chat_template.jinja", "model.safetensors")
    new = {"model-00001-of-00001.safetensors", "model.safetensors.index.json", "notes.txt"}
    assert set(hub.files("user/name")) == (PUBLISHED | new) - {"model.safetensors"}


def test_repository_keeps_its_card_unless_told(hub: HubServer, upload: Any) -> None:
    upload()
    first = hub.files("user/name")["README.md"]
    assert Path("README.md") not in upload(commit_message="other").files
    assert hub.files("user/name")["README.md"] == first
    upload(license="mit", replace_card=True)
    assert b"license: mit" in hub.files("user/name")["README.md"]


def _report(folder: Path, score: float) -> Path:
    questions = {"missing": 0, "scored": 10}
    content = {"preset": {"title": "DocVQA", "name": "docvqa"}, "score": score, "questions": questions}
    return (
        write(folder, {"report.json": json.dumps({**content, "metric": "anls", "unit": "mean score"})}) / "report.json"
    )


def test_card_on_the_hub_gets_the_metadata_of_a_later_push(
    hub: HubServer, upload: Any, api: HfApi, tmp_path: Path
) -> None:
    upload(evaluations=[_report(tmp_path, 0.5)])
    edited = hub.files("user/name")["README.md"].decode() + "\nAn edit on the Hub.\n"
    api.upload_file(path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id="user/name")
    upload(evaluations=[_report(tmp_path, 0.9)], license="mit", base_model="a/b")
    card = ModelCard(hub.files("user/name")["README.md"].decode())
    assert (card.data.license, card.data.base_model) == ("mit", "a/b")
    assert [result.metric_value for result in card.data.eval_results] == [90.0]
    rows = [line for line in card.text.splitlines() if line.startswith("| DocVQA")]
    assert rows == ["| DocVQA | anls, mean score | 90.00 % |  | 10 |"] and "An edit on the Hub." in card.text


# What is refused


@pytest.mark.parametrize("name", ["name", "a/b/c", "../../etc", "user/../x", "user/na me", "user/x\ny", "user/", ""])
def test_hostile_repository_names(hub: HubServer, api: HfApi, checkpoint: Path, code_root: Path, name: str) -> None:
    with pytest.raises(ValueError):
        push(checkpoint, name, code_root=code_root, api=api)
    assert hub.requests == []


def test_repository_of_someone_else(hub: HubServer, checkpoint: Path, code_root: Path, api: HfApi) -> None:
    with pytest.raises(OSError, match="403|rights"):
        push(checkpoint, "other/name", code_root=code_root, api=api)
    assert hub.repositories == {}


def test_private_files_need_the_owner(hub: HubServer, upload: Any) -> None:
    upload()
    for token, visible in ((False, False), ("token-of-other", False), (TOKEN, True)):
        assert HfApi(endpoint=hub.endpoint, token=token).file_exists("user/name", "config.json") is visible
