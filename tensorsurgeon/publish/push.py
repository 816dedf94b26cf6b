"""A finished checkpoint to the Hub: judged first, private unless told otherwise, and nothing that is no part of it."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tensorsurgeon.checkpoint.config_file import CONFIG_NAME
from tensorsurgeon.checkpoint.folder import INDEX_NAMES, RECORD_NAME, Checkpoint, open_checkpoint
from tensorsurgeon.checkpoint.hub.faults import fault_of, persistently
from tensorsurgeon.checkpoint.hub.snapshot import hub_address
from tensorsurgeon.errors import PublishError, RecipeError, VerifyError
from tensorsurgeon.verifying.judging import verify
from tensorsurgeon.version import __version__

logger = logging.getLogger(__name__)


class Pushed(NamedTuple):
    """Where a checkpoint lies on the Hub: its address for a browser, the commit, and how many files it has."""

    address: str
    repository: str
    commit: str
    files: int
    private: bool


def push_checkpoint(
    target: str | os.PathLike[str],
    repository: str,
    *,
    public: bool = False,
    anyway: bool = False,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Pushed:
    """Upload the checkpoint in the folder ``target`` as ``owner/name``; the same call again goes on where one was stopped.

    Raises VerifyError for a checkpoint with faults, which ``anyway`` uploads all the same, PublishError where the Hub does not
    take it, or has a public model of that name and ``public`` was not given. ``progress`` is told the bytes that were verified.
    """
    named = hub_address(repository)
    if named is None or named.revision is not None:
        raise RecipeError(f"{repository!r} is no name on the Hub; give owner/name")
    checkpoint = open_checkpoint(target)
    if checkpoint.snapshot is not None or checkpoint.is_single_file:
        raise RecipeError(f"{os.fspath(target)}: only a folder can be pushed")
    names = files_of(checkpoint)
    _refuse_faults(checkpoint, anyway, workers, progress)
    api = _api()
    private = _make_repository(api, named.repository, public)
    commit = _upload(api, named.repository, checkpoint.root, names)
    _check_arrived(api, named.repository, commit, checkpoint.root, names)
    return Pushed(f"{api.endpoint}/{named.repository}", named.repository, commit, len(names), private)


def files_of(checkpoint: Checkpoint) -> list[str]:
    """What belongs to a checkpoint, by relative path: no state of a run, no partial files or other weights, no link out of it."""
    fixed = [name for name in (*INDEX_NAMES, CONFIG_NAME, RECORD_NAME) if (checkpoint.root / name).is_file()]
    return sorted({*(shard.path.name for shard in checkpoint.shards), *fixed, *checkpoint.side_files})


def _refuse_faults(checkpoint: Checkpoint, anyway: bool, workers: int | None, progress: Callable[[int], None]) -> None:
    faults = verify(checkpoint.root, workers=workers, progress=progress).faults
    if not faults:
        return
    more = f" ({len(faults)} faults)" if len(faults) > 1 else ""
    said = f"{faults[0].where}: {faults[0].message}{more}"
    if not anyway:
        raise VerifyError(
            f"is not pushed, for it has faults: {said}",
            where=str(checkpoint.root),
            remedy="; look at them with {verify}, or push it with {anyway}",
        )
    logger.warning("%s: pushed with faults: %s", checkpoint.root, said)


def _api() -> Any:
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise PublishError("there is no token to write to the Hub with; log in with `hf auth login`, or give one as HF_TOKEN")
    return HfApi(library_name="tensorsurgeon", library_version=__version__)


def _make_repository(api: Any, name: str, public: bool) -> bool:
    """Have the repository, whether it is there or not; returns whether it is private."""
    from huggingface_hub.errors import RepositoryNotFoundError

    def find() -> Any:
        try:
            return api.model_info(name)
        except RepositoryNotFoundError:
            return None

    found = persistently(find, name, PublishError)
    if found is None:
        persistently(lambda: api.create_repo(name, private=not public, exist_ok=True), name, PublishError)
        return not public
    if not found.private and not public:
        raise PublishError("is there and is public: whoever looks would see this", where=name, remedy="; say so with {public}")
    if found.private and public:
        logger.warning("%s: is there and is private; it stays so until its settings say otherwise", name)
    return bool(found.private)


def _upload(api: Any, name: str, folder: Path, names: list[str]) -> str:
    wanted = [glob.escape(file) for file in names]
    message = f"Upload {len(names)} files with tensorsurgeon {__version__}"

    def upload() -> Any:
        # Since 1.31 what was ``upload_large_folder``: in parts, and going on where it was stopped.
        return api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=wanted, commit_message=message).oid

    try:
        return str(persistently(upload, name, PublishError))
    except (OSError, RuntimeError, ValueError) as error:
        if fault_of(error) is not None:
            raise
        raise PublishError(f"the upload was stopped: {' '.join(str(error).split())[:300]}", where=name) from error


def _check_arrived(api: Any, name: str, commit: str, folder: Path, names: list[str]) -> None:
    """Raise PublishError unless the commit has every file, as large as it is here."""
    info = persistently(lambda: api.model_info(name, revision=commit, files_metadata=True), name, PublishError)
    there = {sibling.rfilename: sibling.size for sibling in info.siblings or ()}
    for file in names:
        if there.get(file) != (folder / file).stat().st_size:
            found = "is missing" if file not in there else f"has {there[file]} bytes"
            raise PublishError(f"{file} {found} on the Hub after the upload; push it again", where=name)
