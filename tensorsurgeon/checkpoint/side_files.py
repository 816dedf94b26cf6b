"""The files of a folder that are not its weights: which of them belong to the model and travel with it, and which stay.

What holds other weights (older formats, other engines' copies, adapters, optimizer states) stays behind: it would be a
stale copy of what is changed here. So does what a link leads to outside the folder: it is not the checkpoint's, and whoever
made the checkpoint may have meant a file of the reader's. A snapshot in the Hub's cache links to its own blobs, which are.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Final, NamedTuple

from tensorsurgeon.checkpoint.small_files import MAX_CONFIG_BYTES, Stamp, is_lfs_pointer, parse_json, read_small

_OTHER_WEIGHTS: Final = re.compile(
    r".*\.(safetensors|gguf|ggml|partial|safetensors\.index\.json|onnx|onnx_data|onnx\.data|ot|tflite|mlmodel|ckpt|msgpack|h5)"
    r"|(pytorch_model|diffusion_pytorch_model|model|consolidated|tf_model|flax_model|adapter_model|weight|weights|mp_rank)"
    r"[^/]*\.(bin|pt|pth|npz|pdparams)"
    r"|(optimizer|scheduler|rng_state|scaler|random_states)[^/]*\.(bin|pt|pth|pkl)"
    r"|.*(model|optim)_states\.pt|ggml-.*\.bin|openvino_.*\.(bin|xml)"
    r"|(pytorch_model|consolidated)[^/]*\.index\.json"
)
# Packages that are folders, of which one file means nothing without the others.
_OTHER_MODELS: Final = re.compile(r".*\.(mlpackage|mlmodelc|nemo)")
_HIDDEN: Final = {".git", ".cache", ".surgeon"}
# More is no checkpoint but somebody's disk; each is a path in memory and in the record.
_MAX_FILES: Final = 100_000
_SNAPSHOTS: Final = "snapshots"


class SideFiles(NamedTuple):
    """Paths relative to the folder: what travels along with its stamp, what stays behind, and what is odd."""

    kept: dict[str, Stamp]
    left_behind: tuple[str, ...]
    strange: tuple[str, ...]


def side_files(root: Path, own: set[str]) -> SideFiles:
    """Look at every file below ``root`` that is not in ``own``; PermissionError for one that cannot be read.

    Said now, and not after an hour, when it is to be copied.
    """
    modules = module_folders(root)
    homes = (root.resolve(), *_blobs_of(root))
    kept: dict[str, Stamp] = {}
    left: list[str] = []
    strange: list[str] = []
    for name, is_folder_link in _walk(root, left):
        if is_folder_link:
            strange.append(f"{name}/ is a link to a folder and stays behind")
            continue
        if name in own:
            continue
        path = root / name
        if holds_other_weights(name, modules):
            left.append(name)
        elif (odd := _why_not(path, homes)) is not None:
            strange.append(f"{name} {odd} and stays behind")
        elif not os.access(path, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        else:
            kept[name] = Stamp.of(path.stat())
            if kept[name].nbytes < 1024 and is_lfs_pointer(read_small(path, 1024)[0]):
                strange.append(f"{name} is a Git LFS pointer and not the file itself; run git lfs pull")
    return SideFiles(kept, tuple(left), tuple(strange))


def holds_other_weights(name: str, modules: Set[str]) -> bool:
    """Whether a file, by its path in the checkpoint, stays behind; ``modules`` are ``module_folders``."""
    folder, _, file = name.rpartition("/")
    if folder in modules and file.endswith((".safetensors", ".bin", ".json")):
        return False
    return _OTHER_WEIGHTS.fullmatch(file) is not None


def lies_hidden(name: str) -> bool:
    """Whether a file lies in a folder that nobody looks into, or in a package of another model."""
    folders = name.split("/")[:-1]
    return any(folder in _HIDDEN or _OTHER_MODELS.fullmatch(folder) for folder in folders)


def _walk(root: Path, left: list[str]) -> Iterator[tuple[str, bool]]:
    """Every file by relative path, in order, and every link to a folder; folders of other models go to ``left`` whole."""
    count = 0
    for folder, folders, files in os.walk(root, followlinks=False, onerror=_raise):
        relative = os.path.relpath(folder, root)
        prefix = "" if relative == "." else f"{relative}/"
        left += sorted(prefix + f for f in folders if _OTHER_MODELS.fullmatch(f))
        folders[:] = sorted(f for f in folders if f not in _HIDDEN and not _OTHER_MODELS.fullmatch(f))
        for name in folders:
            if os.path.islink(os.path.join(folder, name)):
                yield prefix + name, True
        for name in sorted(files):
            count += 1
            if count > _MAX_FILES:
                raise OSError(errno.EFBIG, f"holds more than {_MAX_FILES} files, and no checkpoint does", str(root))
            yield prefix + name, False


def _why_not(path: Path, homes: tuple[Path, ...]) -> str | None:
    """Why a file cannot travel along; None if it can."""
    try:
        path.name.encode()
    except UnicodeEncodeError:
        return "has a name that is no UTF-8"
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return "is a broken link or no regular file"
    except OSError:
        return "is a broken link or no regular file"
    real = Path(os.path.realpath(path))
    if path.is_symlink() and not any(home in real.parents for home in homes):
        return "is a link that leads out of the checkpoint"
    return None


def _blobs_of(root: Path) -> list[Path]:
    """The folder of blobs, if ``root`` is a snapshot in a Hub cache: ``models--a--b/snapshots/REVISION``."""
    parents = root.resolve().parents
    is_snapshot = len(parents) > 1 and parents[0].name == _SNAPSHOTS and re.match(r"(models|datasets|spaces)--", parents[1].name)
    return [parents[1] / "blobs"] if is_snapshot else []


def module_folders(root: Path) -> set[str]:
    """Folders that sentence-transformers' modules.json loads beside the model: layers of their own, with weights."""
    try:
        found = parse_json(read_small(root / "modules.json", MAX_CONFIG_BYTES)[0])
    except (OSError, ValueError):
        return set()
    entries = found if isinstance(found, list) else []
    paths = (entry.get("path") for entry in entries if isinstance(entry, dict))
    return {path for path in paths if isinstance(path, str) and path}


def _raise(error: OSError) -> None:
    raise error
