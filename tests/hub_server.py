"""A server on loopback that speaks as much of the Hub's protocol as publishing and loading need, state in memory.

Accounts by token, repositories with commits, branches, tags and pull requests, LFS uploads in one or several parts,
downloads with ranges and redirects to another host name, as the Hub's storage has. It can cut or hold uploads. It
knows no Xet (clients set `HF_HUB_DISABLE_XET`), no data sets or Spaces, and no limits.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_LFS_NAMES = re.compile(r".*\.(safetensors|model|bin|png|pt)")
_LFS_SIZE = 10 * 2**20
_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass(frozen=True)
class Blob:
    """A file of a commit: its bytes, or the SHA-256 of what LFS holds."""

    size: int
    content: bytes | None = None
    lfs: str | None = None

    @property
    def oid(self) -> str:
        """As git and as the Hub's answers name it: the SHA-256 of an LFS file, else git's hash of the blob."""
        return self.lfs or hashlib.sha1(b"blob %d\0" % self.size + (self.content or b"")).hexdigest()


@dataclass
class Repository:
    """Commits are dictionaries of path to `Blob`; `refs` maps branches, tags and `refs/pr/N` to commits."""

    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)
    messages: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, Blob], ref: str, message: str) -> str:
        """A new commit at the head of `ref`; returns its hash."""
        text = f"{len(self.commits)} {message} {sorted((path, blob.oid) for path, blob in files.items())}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.refs[ref], self.messages[sha] = files, sha, message
        return sha

    def find(self, revision: str) -> str | None:
        """The commit that a branch, tag, pull request or hash means."""
        return revision if revision in self.commits else self.refs.get(revision)


class Refusal(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class HubServer:
    """Use it as a context manager; `endpoint` is what `HF_ENDPOINT` must be.

    Attributes:
        repositories: By `user/name`.
        objects: What LFS holds, by SHA-256.
        uploads: How often each object arrived whole.
        requests: (method, path) of all requests, in order.
        cuts: As many uploads to come are cut after their first bytes.
        hold: Set to let the uploads to come stop halfway until the client goes away; `held` is set when one does.
        before_commit: Called before the next commit is looked at, once.
        lost: Of these kinds ("commit", "tag") the next request is carried out and its answer lost, once each.
        down: No request gets an answer.
    """

    def __init__(self, tokens: dict[str, str] | None = None, part_size: int | None = None) -> None:
        self.tokens = tokens or {"token-of-user": "user"}
        self.part_size = part_size
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.uploads: Counter[str] = Counter()
        self.requests: list[tuple[str, str]] = []
        self.cuts = 0
        self.hold, self.held = threading.Event(), threading.Event()
        self.before_commit: Callable[[], Any] | None = None
        self.lost: set[str] = set()
        self.down = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.endpoint, self.storage = f"http://127.0.0.1:{self.port}", f"http://localhost:{self.port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Path to content at a revision."""
        repository = self.repositories[repo_id]
        blobs = repository.commits[repository.find(revision)]  # type: ignore[index]
        return {path: self.content(blob) for path, blob in blobs.items()}

    def content(self, blob: Blob) -> bytes:
        """The bytes of a file."""
        return self.objects[blob.lfs] if blob.lfs else blob.content or b""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""

    # --- plumbing ---

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.hub.requests.append((self.command, url.path))
        self._muted = False
        try:
            for method, pattern, name in _ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and self.command in method.split():
                    getattr(self, name)(*(unquote(value) for value in match.groups()))
                    return
            raise Refusal(404, f"no such route: {self.command} {url.path}")
        except Refusal as refusal:
            self._drain()
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self._json({"error": refusal.message}, refusal.status, headers)
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _drain(self) -> None:
        if not getattr(self, "_read", False):
            self._body()

    def handle_one_request(self) -> None:
        self._read = False
        super().handle_one_request()

    def _body(self) -> bytes:
        self._read = True
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _values(self) -> dict[str, Any]:
        return json.loads(self._body() or b"{}")

    def _send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._drain()
        if self._muted or self.hub.down:
            self.close_connection = True
            return
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    # --- accounts and repositories ---

    def _user(self, needed: bool = True) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        if needed and not token:
            raise Refusal(401, "Invalid username or password.")
        return self.hub.tokens.get(token)

    def _repository(self, repo_id: str, writing: bool = False) -> Repository:
        user, repository = self._user(needed=writing), self.hub.repositories.get(repo_id)
        owner = repo_id.split("/")[0] == user
        if repository is None or (repository.private and not owner):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if writing and not owner:
            raise Refusal(403, "You have no write access to this repository")
        return repository

    def _revision(self, repo_id: str, revision: str, writing: bool = False) -> tuple[Repository, str]:
        repository = self._repository(repo_id, writing)
        sha = repository.find(revision)
        if sha is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository, sha

    def _whoami(self) -> None:
        self._json({"type": "user", "name": self._user(), "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def _create(self) -> None:
        values, user = self._values(), self._user()
        repo_id = f"{values.get('organization') or user}/{values['name']}"
        if repo_id.split("/")[0] != user:
            raise Refusal(403, f"You don't have the rights to create a model under {repo_id.split('/')[0]}")
        if repo_id in self.hub.repositories:
            return self._json({"error": "You already created this model repo", "url": self._url(repo_id)}, 409)
        private = values.get("visibility") == "private" or bool(values.get("private"))
        repository = self.hub.repositories[repo_id] = Repository(private)
        repository.commit({".gitattributes": Blob(len(_ATTRIBUTES), _ATTRIBUTES)}, "main", "initial commit")
        self._json({"url": self._url(repo_id), "name": repo_id})

    def _url(self, repo_id: str) -> str:
        return f"{self.hub.endpoint}/{repo_id}"

    def _branch(self, repo_id: str, branch: str) -> None:
        repository, sha = self._revision(repo_id, self._values().get("startingPoint") or "main", True)
        self._new_ref(repository, branch, sha)

    def _tag(self, repo_id: str, revision: str) -> None:
        repository, sha = self._revision(repo_id, revision, True)
        tag = self._values()["tag"]
        self._lose("tag")
        self._new_ref(repository, tag, sha)
        repository.tags.add(tag)

    def _lose(self, kind: str) -> None:
        self._muted = kind in self.hub.lost
        self.hub.lost.discard(kind)

    def _new_ref(self, repository: Repository, name: str, sha: str) -> None:
        self._drain()
        if name in repository.refs:
            raise Refusal(409, f"Reference {name} exists already")
        repository.refs[name] = sha
        self._json({})

    def _refs(self, repo_id: str) -> None:
        repository = self._repository(repo_id)
        found: dict[str, list] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        for name, sha in repository.refs.items():
            kind = "pullRequests" if name.startswith("refs/pr/") else "tags" if name in repository.tags else "branches"
            full = name if kind == "pullRequests" else f"refs/{'tags' if kind == 'tags' else 'heads'}/{name}"
            found[kind].append({"name": name, "ref": full, "targetCommit": sha})
        self._json(found)

    # --- reading ---

    def _info(self, repo_id: str, revision: str = "main") -> None:
        repository, sha = self._revision(repo_id, revision)
        names = [{"rfilename": path} for path in sorted(repository.commits[sha])]
        common = {"id": repo_id, "modelId": repo_id, "sha": sha, "private": repository.private, "siblings": names}
        self._json({**common, "tags": [], "downloads": 0, "likes": 0, "gated": False, "disabled": False})

    def _tree(self, repo_id: str, revision: str) -> None:
        repository, sha = self._revision(repo_id, revision)
        self._json([_entry(path, blob) for path, blob in sorted(repository.commits[sha].items())])

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        repository, sha = self._revision(repo_id, revision)
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        blob = repository.commits[sha].get(path)
        if blob is None:
            self._json({"error": "Entry not found"}, 404, {**headers, "X-Error-Code": "EntryNotFound"})
        elif blob.lfs:
            linked = {"X-Linked-Size": str(blob.size), "X-Linked-Etag": f'"{blob.lfs}"'}
            self._send(b"", 302, {**headers, **linked, "Location": f"{self.hub.storage}/storage/{blob.lfs}"})
        else:
            self._ranged(blob.content or b"", {**headers, "ETag": f'"{blob.oid}"'})

    def _stored(self, oid: str) -> None:
        self._ranged(self.hub.objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _ranged(self, content: bytes, headers: dict[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not match:
            return self._send(content, 200, headers)
        start, end = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
        if start > end:
            return self._send(b"", 416, {**headers, "Content-Range": f"bytes */{len(content)}"})
        place = {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
        return self._send(content[start : end + 1], 206, {**headers, **place})

    # --- writing ---

    def _yaml(self) -> None:
        self._drain()
        self._json({"errors": [], "warnings": []})

    def _preupload(self, repo_id: str, revision: str) -> None:
        repository, sha = self._revision(repo_id, revision, True)
        there, answers = repository.commits[sha], []
        for file in self._values()["files"]:
            path = file["path"]
            mode = "lfs" if _LFS_NAMES.fullmatch(path) or file["size"] > _LFS_SIZE else "regular"
            oid = there[path].oid if path in there else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def _batch(self, repo_id: str) -> None:
        self._repository(repo_id, writing=True)
        self._json({"transfer": "basic", "objects": [self._action(each) for each in self._values()["objects"]]})

    def _action(self, wanted: dict[str, Any]) -> dict[str, Any]:
        oid, size, part = wanted["oid"], wanted["size"], self.hub.part_size
        if oid in self.hub.objects:
            return {"oid": oid, "size": size}
        upload: dict[str, Any] = {"href": f"{self.hub.storage}/storage/{oid}"}
        if part is not None and size > part:
            places = {str(i + 1): f"{self.hub.storage}/storage/{oid}/{i + 1}" for i in range(-(-size // part))}
            upload = {"href": f"{self.hub.endpoint}/complete/{oid}", "header": {"chunk_size": str(part), **places}}
        actions = {"upload": upload, "verify": {"href": f"{self.hub.endpoint}/verify"}}
        return {"oid": oid, "size": size, "actions": actions}

    def _put(self, oid: str, part: str | None = None) -> None:
        if self.hub.cuts or self.hub.hold.is_set():
            return self._break_off()
        content = self._body()
        if part:
            self.hub.parts[oid, int(part)] = content
        elif hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "the content does not have this hash")
        else:
            self._keep(oid, content)
        return self._send(b"", 200, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    def _break_off(self) -> None:
        self.rfile.read(100)
        self.close_connection, self._read = True, True
        if self.hub.cuts:
            self.hub.cuts -= 1
        else:
            self.hub.held.set()
            while self.rfile.read1(2**16):  # type: ignore[attr-defined]
                pass
        self.connection.close()

    def _complete(self, oid: str) -> None:
        numbers = [part["partNumber"] for part in self._values()["parts"]]
        content = b"".join(self.hub.parts[oid, number] for number in numbers)
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "the parts do not have this hash")
        self._keep(oid, content)
        self._json({})

    def _keep(self, oid: str, content: bytes) -> None:
        self.hub.objects[oid] = content
        self.hub.uploads[oid] += 1

    def _verify(self) -> None:
        values = self._values()
        if len(self.hub.objects.get(values["oid"], b"")) != values["size"]:
            raise Refusal(404, "no such object of this size")
        self._json({})

    def _commit(self, repo_id: str, revision: str) -> None:
        if self.hub.before_commit is not None:
            call, self.hub.before_commit = self.hub.before_commit, None
            call()
        lines = [json.loads(line) for line in self._body().splitlines() if line]
        repository, sha = self._revision(repo_id, revision, True)
        header = lines[0]["value"]
        proposal = "create_pr" in self.query
        parent = header.get("parentCommit") or sha
        if parent != sha and not proposal:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.commits[parent])
        for line in lines[1:]:
            self._apply(files, line["key"], line["value"])
        number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
        new = repository.commit(files, f"refs/pr/{number}" if proposal else revision, header["summary"])
        self._lose("commit")
        url = f"{self._url(repo_id)}/discussions/{number}" if proposal else None
        answer = {"success": True, "commitOid": new, "commitUrl": f"{self._url(repo_id)}/commit/{new}"}
        self._json({**answer, "pullRequestUrl": url})

    def _apply(self, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            content = base64.b64decode(value["content"])
            files[path] = Blob(len(content), content)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.objects:
                raise Refusal(400, f"{path} points to an LFS file that does not exist")
            files[path] = Blob(value["size"], lfs=value["oid"])
        elif key == "deletedFile" and path in files:
            del files[path]
        else:
            raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
    return entry | ({"lfs": {"oid": blob.lfs, "size": blob.size, "pointerSize": 135}} if blob.lfs else {})


_ID = r"([^/]+/[^/]+)"
_ROUTES = (
    ("GET", "/api/whoami-v2", "_whoami"),
    ("POST", "/api/repos/create", "_create"),
    ("POST", "/api/validate-yaml", "_yaml"),
    ("GET", rf"/api/models/{_ID}", "_info"),
    ("GET", rf"/api/models/{_ID}/revision/([^/]+)", "_info"),
    ("GET", rf"/api/models/{_ID}/refs", "_refs"),
    ("GET", rf"/api/models/{_ID}/tree/([^/]+)", "_tree"),
    ("POST", rf"/api/models/{_ID}/branch/([^/]+)", "_branch"),
    ("POST", rf"/api/models/{_ID}/tag/([^/]+)", "_tag"),
    ("POST", rf"/api/models/{_ID}/preupload/([^/]+)", "_preupload"),
    ("POST", rf"/api/models/{_ID}/commit/([^/]+)", "_commit"),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", "_batch"),
    ("PUT", r"/storage/(\w+)", "_put"),
    ("PUT", r"/storage/(\w+)/(\d+)", "_put"),
    ("GET HEAD", r"/storage/(\w+)", "_stored"),
    ("POST", r"/complete/(\w+)", "_complete"),
    ("POST", "/verify", "_verify"),
    ("GET HEAD", rf"/{_ID}/resolve/([^/]+)/(.+)", "_resolve"),
)
