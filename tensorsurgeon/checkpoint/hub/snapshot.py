"""What names a model on the Hub, and what a commit of it holds. Plain values: nothing here asks the Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

# With one slash too: paths that go through ``pathlib`` lose the other.
_SCHEME: Final = r"(?:hf://?)?"
_PART: Final = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]|\.(?!\.))*"
_ADDRESS: Final = re.compile(rf"{_SCHEME}({_PART}/{_PART})(?:@([^\s@]+))?")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")


class HubAddress(NamedTuple):
    """A model on the Hub and the branch, tag or commit that was asked for; the main branch where none was."""

    repository: str
    revision: str | None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


class HubFile(NamedTuple):
    """A file of a commit; ``sha256`` is of its content, which the Hub knows of files that Git does not hold itself."""

    nbytes: int
    git: str
    sha256: str | None

    @property
    def digest(self) -> str:
        """By what its content is known: ``sha256:...``, or ``git:...`` (SHA-1 of the content with Git's header)."""
        return f"git:{self.git}" if self.sha256 is None else f"sha256:{self.sha256}"


class Snapshot(NamedTuple):
    """One commit of a model on the Hub with its files; whatever happens to the branch, this is what is read."""

    repository: str
    # What was asked for: a branch, a tag or the commit itself.
    revision: str
    commit: str
    files: Mapping[str, HubFile]

    def __str__(self) -> str:
        return f"{self.repository}@{self.commit}"

    def where(self, name: str) -> str:
        """How messages name a file of it."""
        return f"{self.repository}/{name}"


def hub_address(text: str) -> HubAddress | None:
    """The model that ``owner/name``, ``owner/name@revision`` or the same after ``hf://`` names; None for any other text."""
    found = _ADDRESS.fullmatch(text)
    if found is None or found[1].endswith(".safetensors"):
        return None
    return HubAddress(found[1], found[2])


def is_commit(revision: str) -> bool:
    """Whether a revision is a commit, which never moves."""
    return _COMMIT.fullmatch(revision) is not None
