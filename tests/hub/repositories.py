"""What the Hub of the tests holds: repositories, their commits, and the content of files."""

from __future__ import annotations

import hashlib
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path

# The real one decides by .gitattributes, which names these and more; and by size, for what is no text.
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")
LFS_BYTES = 10 << 20


@dataclass(frozen=True)
class Blob:
    """The content of a file, in memory or on disk, and the names that Git and LFS give it."""

    path: Path
    nbytes: int
    git: str
    sha256: str
    is_lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git

    def read(self, start: int, stop: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(stop - start)


@dataclass
class Repository:
    """Commits by their hash, each with all of its files, and branches and tags that name them."""

    name: str
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, Blob], ref: str = "main", message: str = "") -> str:
        """Add a commit on top of a branch; a branch that is new begins with it."""
        parent = self.refs.get(ref, "")
        text = parent + message + "".join(f"{name}{blob.etag}" for name, blob in sorted(files.items()))
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit] = files
        self.refs[ref] = commit
        self.messages.append(message)
        return commit

    def resolve(self, revision: str) -> str | None:
        commit = self.refs.get(revision, revision)
        return commit if commit in self.commits else None

    def files(self, revision: str = "main") -> dict[str, Blob]:
        return self.commits[self.refs.get(revision, revision)]


class Storage:
    """Every repository, and every blob by its name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, Blob] = {}
        self.lock = threading.Lock()

    def add_bytes(self, content: bytes, name: str) -> Blob:
        path = self.folder / hashlib.sha256(content).hexdigest()
        path.write_bytes(content)
        return self.add_file(path, name)

    def add_file(self, path: Path, name: str) -> Blob:
        sha256, git = hashlib.sha256(), hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                sha256.update(chunk)
                git.update(chunk)
        is_lfs = name.endswith(LFS_SUFFIXES) or path.stat().st_size > LFS_BYTES
        blob = Blob(path, path.stat().st_size, git.hexdigest(), sha256.hexdigest(), is_lfs)
        self.blobs[blob.sha256] = blob
        return blob

    def add_model(self, name: str, folder: Path, **more: bool) -> Repository:
        """A folder as a repository with one commit; its files stay where they lie."""
        repository = Repository(name, **more)
        self.repositories[name] = repository
        repository.commit(self.files_of(folder))
        return repository

    def files_of(self, folder: Path) -> dict[str, Blob]:
        found = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return {str(path.relative_to(folder)): self.add_file(path, path.name) for path in found}

    def check_out(self, name: str, folder: Path, revision: str = "main") -> Path:
        """A folder with the files of a commit, as a clone would have them."""
        for file, blob in self.repositories[name].files(revision).items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(blob.path, folder / file)
        return folder
