"""How the Hub of the tests answers: the routes that ``huggingface_hub`` 2.4 asks for models, and the faults on their way."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.cards import errors_of
from tests.hub.faults import Fault
from tests.hub.repositories import LFS_BYTES, LFS_SUFFIXES, Blob, Repository

if TYPE_CHECKING:
    from tests.hub.server import Hub

_MODEL = r"/api/models/(?P<repo>[^/]+/[^/]+)"
_ROUTES = (
    ("GET", re.compile(rf"{_MODEL}(?:/revision/(?P<revision>.+))?"), "model_info"),
    ("GET", re.compile(rf"{_MODEL}/tree/(?P<revision>[^/]+)"), "tree"),
    ("POST", re.compile(rf"{_MODEL}/preupload/(?P<revision>[^/]+)"), "preupload"),
    ("POST", re.compile(rf"{_MODEL}/commit/(?P<revision>[^/]+)"), "commit"),
    ("POST", re.compile(r"/api/repos/create"), "create"),
    ("POST", re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch"), "batch"),
    ("POST", re.compile(r"/api/validate-yaml"), "validate_yaml"),
    ("GET", re.compile(r"/api/whoami-v2"), "whoami"),
    ("GET", re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)"), "resolve"),
    ("GET", re.compile(r"/stored/(?P<sha256>[0-9a-f]{64})"), "stored"),
    ("PUT", re.compile(r"/stored/(?P<sha256>[0-9a-f]{64})"), "store"),
)


class Request(NamedTuple):
    """One request that was answered; ``nbytes`` of body were sent."""

    method: str
    path: str
    status: int
    nbytes: int
    span: str | None
    token: str | None


class _Answer(Exception):  # ends a request with a status
    def __init__(self, status: int, code: str = "", message: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers
        self.message = message


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_HEAD(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def _serve(self, method: str) -> None:
        self.sent = 0
        self.status = 0
        self.server_hub.under_way += 1
        path = urlsplit(self.path).path
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.fault = self.server_hub.faults.take(f"{self.command} {path}") or Fault("")
        with suppress(ConnectionError):
            try:
                self._route(method, path)
            except _Answer as answer:
                said = {"X-Error-Code": answer.code, "X-Error-Message": answer.message}
                headers = {name: value for name, value in said.items() if value} | answer.headers
                self._send(answer.status, b'{"error":"%s"}' % answer.message.encode(), headers)
        # A client that has the last byte goes on before this is noted.
        self.server_hub.requests.append(
            Request(self.command, path, self.status, self.sent, self.headers.get("Range"), self._token())
        )
        self.server_hub.under_way -= 1

    def _route(self, method: str, path: str) -> None:
        if self.fault.stall is not None:
            time.sleep(self.fault.stall)
        if self.fault.status is not None:
            raise _Answer(self.fault.status, self.fault.code or "", self.fault.message or "no", **self.fault.headers)
        for known, pattern, name in _ROUTES:
            found = pattern.fullmatch(path)
            if found and known == method:
                parts = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
                getattr(self, f"_{name}")(**parts)
                return
        raise _Answer(404, message=f"no such route {path}")

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _repository(self, name: str, *, write: bool = False) -> Repository:
        repository = self.server_hub.storage.repositories.get(name)
        known = self._token() in self.server_hub.tokens
        if self._token() is not None and not known:
            raise _Answer(401, message="Invalid credentials in Authorization header")
        if repository is None or (repository.private and not known):
            raise _Answer(404 if known else 401, "RepoNotFound", "Repository not found")
        if write and not known:
            raise _Answer(403, message="you have no right to write here")
        return repository

    def _commit_of(self, repository: Repository, revision: str) -> str:
        commit = repository.resolve(revision)
        if commit is None:
            raise _Answer(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _model_info(self, repo: str, revision: str = "main") -> None:
        repository = self._repository(repo)
        commit = self._commit_of(repository, revision)
        with_files = parse_qs(urlsplit(self.path).query).get("blobs") in (["True"], ["true"], ["1"])
        siblings = [_sibling(name, blob, with_files) for name, blob in repository.commits[commit].items()]
        found = {
            "_id": "0", "id": repo, "modelId": repo, "sha": commit, "private": repository.private, "gated": repository.gated,
            "disabled": False, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings,
        }  # fmt: skip
        self._json(found)

    def _tree(self, repo: str, revision: str) -> None:
        repository = self._repository(repo)
        files = repository.commits[self._commit_of(repository, revision)]
        entries = []
        for name, blob in files.items():
            lfs = {"lfs": {"oid": blob.sha256, "size": blob.nbytes, "pointerSize": 134}} if blob.is_lfs else {}
            entries.append({"type": "file", "path": name, "size": blob.nbytes, "oid": blob.git, **lfs})
        self._json(entries)

    def _whoami(self) -> None:
        if self._token() not in self.server_hub.tokens:
            raise _Answer(401, message="Invalid username or password.")
        self._json({"type": "user", "name": "owner", "orgs": []})

    def _validate_yaml(self) -> None:
        errors = [{"message": message} for message in errors_of(json.loads(self.body)["content"])]
        said = json.dumps({"errors": errors, "warnings": [], "error": "; ".join(one["message"] for one in errors)})
        self._send(400 if errors else 200, said.encode(), {"Content-Type": "application/json"})

    def _resolve(self, repo: str, revision: str, file: str) -> None:
        repository = self._repository(repo)
        if repository.gated and self._token() is None:
            raise _Answer(401, "GatedRepo", f"Access to model {repo} is restricted.")
        commit = self._commit_of(repository, revision)
        blob = repository.commits[commit].get(file)
        if blob is None:
            raise _Answer(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit})
        linked = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes", "ETag": f'"{blob.etag}"'}
        if blob.is_lfs:
            linked |= {"X-Linked-Size": str(blob.nbytes), "X-Linked-ETag": f'"{blob.sha256}"'}
            self._send(302, b"", linked | {"Location": f"{self.server_hub.stored_at}/stored/{blob.sha256}"})
        else:
            self._send_file(blob, linked)

    def _stored(self, sha256: str) -> None:
        blob = self.server_hub.storage.blobs.get(sha256)
        if blob is None:
            raise _Answer(403, message="AccessDenied")
        self._send_file(blob, {"ETag": f'"{sha256[:32]}"', "Accept-Ranges": "bytes"})

    def _send_file(self, blob: Blob, headers: dict[str, str]) -> None:
        start, stop, status = 0, blob.nbytes, 200
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if span and not self.fault.ignore_range:
            start, stop = int(span[1]), min(blob.nbytes, int(span[2]) + 1 if span[2] else blob.nbytes)
            if start >= blob.nbytes:
                raise _Answer(416, message="Range Not Satisfiable", **{"Content-Range": f"bytes */{blob.nbytes}"})
            status = 206
            headers = headers | {"Content-Range": f"bytes {start}-{stop - 1}/{blob.nbytes}"}
        self._begin(status, stop - start, headers)
        if self.command == "HEAD":
            return
        for at in range(start, stop, 1 << 20):
            chunk = bytearray(blob.read(at, min(stop, at + (1 << 20))))
            if self.fault.flip is not None and at <= self.fault.flip < at + len(chunk):
                chunk[self.fault.flip - at] ^= 0xFF
            if self.fault.cut_after is not None and self.sent + len(chunk) > self.fault.cut_after:
                self._write(bytes(chunk[: self.fault.cut_after - self.sent]))
                self.close_connection = True
                return
            self._write(bytes(chunk))
            if self.server_hub.seconds_per_mb:
                time.sleep(self.server_hub.seconds_per_mb * len(chunk) / (1 << 20))

    def _create(self) -> None:
        if self._token() not in self.server_hub.tokens:
            raise _Answer(401, message="Invalid username or password.")
        said = json.loads(self.body)
        name = f"{said.get('organization') or 'owner'}/{said['name']}"
        storage = self.server_hub.storage
        if name in storage.repositories:
            raise _Answer(409, message="You already created this model repo")
        private = said.get("private", said.get("visibility") == "private")
        repository = storage.repositories[name] = Repository(name, private=bool(private))
        repository.commit(
            {".gitattributes": storage.add_bytes(b"*.safetensors filter=lfs\n", ".gitattributes")}, message="initial commit"
        )
        self._json({"url": f"{self.server_hub.endpoint}/{name}", "name": name, "id": name})

    def _preupload(self, repo: str, revision: str) -> None:
        files = self._repository(repo, write=True).files(revision)
        answer = []
        for file in json.loads(self.body)["files"]:
            is_lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_BYTES
            known = files.get(file["path"])
            answer.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_lfs else "regular",
                    "shouldIgnore": False,
                    **({"oid": known.etag} if known else {}),
                }
            )
        self._json({"files": answer})

    def _batch(self, repo: str) -> None:
        self._repository(repo, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            found = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server_hub.storage.blobs:
                href = f"{self.server_hub.stored_at}/stored/{wanted['oid']}"
                found["actions"] = {"upload": {"href": href, "header": {}}}
            objects.append(found)
        self._json({"transfer": "basic", "objects": objects})

    def _store(self, sha256: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise _Answer(400, message="the content is another")
        self.server_hub.storage.add_bytes(self.body, "x.safetensors")
        self._send(200, b"", {"ETag": f'"{sha256[:32]}"'})

    def _commit(self, repo: str, revision: str) -> None:
        repository, storage = self._repository(repo, write=True), self.server_hub.storage
        lines = [json.loads(line) for line in self.body.splitlines()]
        with storage.lock:
            files = dict(repository.files(revision))
            message = ""
            for line in lines:
                value = line["value"]
                match line["key"]:
                    case "header":
                        message = value["summary"]
                    case "file":
                        files[value["path"]] = storage.add_bytes(base64.b64decode(value["content"]), value["path"])
                    case "lfsFile":
                        if value["oid"] not in storage.blobs:
                            raise _Answer(400, message=f"{value['path']} was not uploaded")
                        files[value["path"]] = storage.blobs[value["oid"]]
                    case "deletedFile":
                        files.pop(value["path"], None)
            commit = repository.commit(files, revision, message)
        self._json({"success": True, "commitOid": commit, "commitUrl": f"{self.server_hub.endpoint}/{repo}/commit/{commit}"})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self._begin(status, len(body), headers)
        if self.command != "HEAD":
            self._write(body)

    def _begin(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.status = status
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def _write(self, data: bytes) -> None:
        self.wfile.write(data)
        self.sent += len(data)


def _sibling(name: str, blob: Blob, with_files: bool) -> dict[str, Any]:
    if not with_files:
        return {"rfilename": name}
    lfs = {"lfs": {"sha256": blob.sha256, "size": blob.nbytes, "pointerSize": 134}} if blob.is_lfs else {}
    return {"rfilename": name, "size": blob.nbytes, "blobId": blob.git, **lfs}
