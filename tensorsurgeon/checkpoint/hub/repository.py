"""Ask the Hub, with the library's token, endpoint, cache and offline switch: which files, small files, ranges of bytes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from tensorsurgeon.checkpoint.hub.faults import FIRST_WAITS, persistently
from tensorsurgeon.checkpoint.hub.snapshot import HubAddress, HubFile, Snapshot, is_commit
from tensorsurgeon.errors import CheckpointError, SourceError

_CONNECTIONS: Final = 8
_SECONDS: Final = 30.0
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_MAIN: Final = "main"


def ask_snapshot(address: HubAddress, waits: Sequence[float] = FIRST_WAITS) -> Snapshot:
    """The commit that an address means now, and its files; CheckpointError says why there is none.

    ``waits``: seconds before each new try while the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    def ask() -> Any:
        return HfApi().model_info(address.repository, revision=address.revision, files_metadata=True, timeout=_SECONDS)

    info = persistently(ask, str(address), CheckpointError, unreached_waits=waits)
    files = {
        sibling.rfilename: HubFile(sibling.size or 0, sibling.blob_id or "", None if sibling.lfs is None else sibling.lfs.sha256)
        for sibling in info.siblings or ()
    }
    return Snapshot(address.repository, address.revision or _MAIN, str(info.sha), files)


def cached_snapshot(address: HubAddress) -> tuple[Snapshot, Path, bool] | None:
    """What the cache holds of an address: the commit with its files, its folder, and whether the list of files is the Hub's.

    Where the cache has no list (it is kept by downloads of whole snapshots), the files are those that lie there.
    """
    import huggingface_hub
    from huggingface_hub import errors

    config = huggingface_hub.try_to_load_from_cache(address.repository, "config.json", revision=address.revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    commit = folder.name
    if not is_commit(commit):
        return None
    try:
        listed = huggingface_hub.get_cached_repo_tree(address.repository, revision=commit)
    except errors.CachedRepoTreeNotFoundError:
        listed = None
    if listed is not None:
        files = {f.path: HubFile(f.size, f.blob_id, None if f.lfs is None else f.lfs.sha256) for f in listed}
        return Snapshot(address.repository, address.revision or _MAIN, commit, files), folder, True
    return Snapshot(address.repository, address.revision or _MAIN, commit, dict(_files_in(folder))), folder, False


def _files_in(folder: Path) -> Iterable[tuple[str, HubFile]]:
    """Files of a snapshot in the cache: links to blobs, whose names are their digests."""
    for at, _, names in os.walk(folder):
        for name in names:
            path = Path(at) / name
            blob = Path(os.path.realpath(path)).name
            if path.exists():
                sha256 = blob if _SHA256.fullmatch(blob) else None
                yield str(path.relative_to(folder)), HubFile(path.stat().st_size, "" if sha256 else blob, sha256)


def is_offline() -> bool:
    """Whether the library's offline switch is on."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def fetch_into_cache(snapshot: Snapshot, names: Iterable[str]) -> Path:
    """Have these files in the library's cache; returns the folder of the commit there. CheckpointError where that fails."""
    from huggingface_hub import hf_hub_download

    def fetch(name: str) -> Path:
        def download() -> str:
            return hf_hub_download(snapshot.repository, name, revision=snapshot.commit, tqdm_class=silent_bar())

        path = Path(persistently(download, snapshot.where(name), CheckpointError))
        return path.parents[name.count("/")]

    names = list(names)
    with ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="hub") as pool:
        folders = list(pool.map(fetch, names))
    if not folders:
        raise CheckpointError("the repository holds nothing that describes a model", where=str(snapshot))
    if not is_commit(snapshot.revision):
        # So that the branch's name leads to this commit without a connection too, if it did not move meanwhile.
        with suppress(Exception):
            hf_hub_download(snapshot.repository, names[0], revision=snapshot.revision)
    return folders[0]


def silent_bar(watch: Callable[[], None] = lambda: None) -> Any:
    """A class of bars, as tqdm's, that show nothing: progress is the caller's to tell. ``watch`` is called with every piece."""
    from tqdm import tqdm

    class Silent(tqdm):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **{**{k: v for k, v in named.items() if k != "name"}, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            watch()
            return super().update(n)

    return Silent


def read_range(
    snapshot: Snapshot, name: str, start: int, stop: int, error: type[CheckpointError] | type[SourceError] = CheckpointError
) -> bytes:
    """Bytes ``start`` to ``stop`` of a file, asked for as a range; ``error`` where the file is another than the commit's."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub import utils as library

    http: Any = library  # it exports more than its types say
    where, file = snapshot.where(name), snapshot.files[name]
    url = hf_hub_url(snapshot.repository, name, revision=snapshot.commit)

    def ask() -> bytes:
        headers = {**http.build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with http.http_stream_backoff(
            "GET", url, headers=headers, timeout=_SECONDS, retry_on_exceptions=(), retry_on_status_codes=()
        ) as response:
            _refuse_another(response, file, where, error)
            http.hf_raise_for_status(response)
            if response.status_code != 206 and (start, stop) != (0, file.nbytes):
                # To read on would be to download the file.
                raise error("is not served in parts; download the model and name its folder", where=where)
            return bytes(response.read())

    data = persistently(ask, where, error)
    if len(data) != stop - start:
        raise error(f"{stop - start} bytes at {start} were asked for and {len(data)} came", where=where)
    return data


def _refuse_another(response: Any, file: HubFile, where: str, error: type[CheckpointError] | type[SourceError]) -> None:
    """Raise ``error`` if the Hub answers with other content than it listed for the commit."""
    etag = size = None
    for answer in (*response.history, response):
        # Where a file is stored elsewhere, what leads there names the content; what stores it has names of its own.
        etag = etag or answer.headers.get("X-Linked-Etag")
        size = size or answer.headers.get("X-Linked-Size")
    if etag is not None and file.sha256 is not None and etag.removeprefix("W/").strip('"') != file.sha256:
        raise error(f"the Hub now serves another file (etag {etag}, listed was {file.sha256}); make the plan again", where=where)
    if size is not None and int(size) != file.nbytes:
        raise error(f"the Hub now serves {size} bytes, listed were {file.nbytes}; make the plan again", where=where)
