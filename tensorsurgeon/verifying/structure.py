"""Do headers, index and files agree with each other, and does the record know the bytes?"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import xxhash

from tensorsurgeon.checkpoint.folder import RECORD_NAME, STATE_FOLDER, Checkpoint, Oddity, open_checkpoint
from tensorsurgeon.checkpoint.header import read_header
from tensorsurgeon.checkpoint.layout import INDEX_NAME
from tensorsurgeon.checkpoint.tensor_reader import CHUNK_BYTES, TensorReader
from tensorsurgeon.errors import CheckpointError, HeaderError, SurgeonError
from tensorsurgeon.machine.threads import in_threads
from tensorsurgeon.running.record import Range, read_record, recorded_ranges
from tensorsurgeon.verifying.findings import Findings
from tensorsurgeon.verifying.finite import FiniteCheck

# ``model-00002-of-00005.safetensors``, but not 1 of 1.
_OF_SEVERAL: Final = re.compile(r"-\d{5}-of-(?!00001)\d{5}\.safetensors$")


def open_for_judgement(path: Path, findings: Findings) -> Checkpoint | None:
    """The checkpoint with what is odd about it as findings; None, and faults, where it cannot be read at all.

    Raises CheckpointError for a path that is no checkpoint: there is nothing to judge.
    """
    try:
        checkpoint = open_checkpoint(path, tolerant=True)
    except SurgeonError as error:
        if type(error) is CheckpointError:
            if path.is_dir() and ((path / STATE_FOLDER).is_dir() or any(path.glob("*.partial"))):
                findings.fault(
                    "unfinished",
                    path.name,
                    f"an unfinished run of surgeon lies here ({error.message}); resume or remove it",
                )
                return None
            raise
        _fault_unreadable(path, error, findings)
        return None
    _check_files(checkpoint, path, findings)
    return checkpoint


def _fault_unreadable(path: Path, error: SurgeonError, findings: Findings) -> None:
    """One broken shard stops the reader; the others are looked at all the same."""
    broken = set()
    # What lies on the Hub is told by the error alone.
    here = [path] if path.exists() else []
    for shard in sorted(path.glob("*.safetensors")) if path.is_dir() else here:
        try:
            read_header(shard)
        except HeaderError as other:
            broken.add(str(shard))
            findings.fault("header", shard.name, other.message)
    if error.where not in broken:
        where = Path(error.where).name if error.where else path.name
        kind = "header" if isinstance(error, HeaderError) else "files"
        findings.fault("index" if where == INDEX_NAME else kind, where, error.message)


def _check_files(checkpoint: Checkpoint, path: Path, findings: Findings) -> None:
    root = checkpoint.root
    if path.is_file():
        return
    if (root / STATE_FOLDER).is_dir():
        findings.fault("unfinished", STATE_FOLDER, "an unfinished run of surgeon lies here; resume or remove it")
    if len(checkpoint.shards) > 1 and not checkpoint.has_index:
        findings.fault(
            "index", INDEX_NAME, f"is missing; loaders read what it names, and of {len(checkpoint.shards)} shards it names none"
        )
    for oddity in checkpoint.oddities:
        match oddity.kind:
            case "total-size":
                _judge_total_size(checkpoint, oddity, findings)
            case "index":
                findings.fault("index", oddity.where, oddity.text.removeprefix(f"{oddity.where}: "))
            case "missing-shard":
                findings.fault("index", INDEX_NAME, oddity.text)
            case "file":
                findings.note("files", oddity.where, oddity.text.removeprefix(f"{oddity.where} "))
    for name in checkpoint.left_behind:
        if name.endswith(".partial"):
            findings.fault("leftover", name, "a part of an unfinished run; remove it, or resume the run")
        else:
            findings.note("other-weights", name, "holds weights that are no part of this checkpoint")
    if checkpoint.config_text is None:
        findings.note("no-config", "config.json", "is missing, so nothing says how the tensors are to be read")


def _judge_total_size(checkpoint: Checkpoint, oddity: Oddity, findings: Findings) -> None:
    """Two tools write another number than the tensors' bytes; any third number is a stale index."""
    total = oddity.value
    files = sum(shard.file_bytes for shard in checkpoint.shards)
    if total == 0 or total == files:
        meaning = "nothing" if total == 0 else "the bytes of the files, headers included"
        findings.note(
            "total-size", INDEX_NAME, f"total_size {total} counts {meaning}; the tensors have {checkpoint.weight_bytes} bytes"
        )
    else:
        findings.fault("total-size", INDEX_NAME, oddity.text)


def read_record_to_judge(root: Path, findings: Findings) -> dict[str, Any] | None:
    """``surgeon.json``; None where there is none, and with a fault where it cannot be read."""
    try:
        return read_record(root)
    except SurgeonError as error:
        findings.fault("record", RECORD_NAME, error.message)
        return None


def check_digests(reader: TensorReader, record: dict[str, Any], finite: FiniteCheck, findings: Findings, workers: int) -> int:
    """Compare every byte range that ``surgeon.json`` knows; the bytes compared. What is read is looked at for NaN too."""
    checkpoint = reader.checkpoint
    numbers = {shard.path.name: number for number, shard in enumerate(checkpoint.shards)}
    known = {name for name, ranges in record["shards"].items() if ranges}
    if is_one_shard(checkpoint):
        known &= numbers.keys()
    for name in numbers.keys() - known:
        findings.fault("record", name, f"{RECORD_NAME} does not know this shard; it was added or renamed after the run")
    whole: set[str] = set()
    # As many ranges as tensors, or more: they are looked at one by one.
    for name, own in groupby(recorded_ranges(record), lambda found: found.shard):
        if name not in known:
            continue
        number = numbers.get(name)
        if number is None:
            findings.fault("record", name, f"{RECORD_NAME} says that the run wrote this shard, but it is not here")
        elif _tiles(own, checkpoint.shards[number].file_bytes, name, findings):
            whole.add(name)
    jobs = ((numbers[found.shard], found) for found in recorded_ranges(record) if found.shard in whole)
    finite.rest({number for name, number in numbers.items() if name not in whole}, workers)
    name_at = _names_by_offset(checkpoint)

    def compare(job: tuple[int, Range]) -> int:
        number, found = job
        digest = xxhash.xxh3_64()
        for start in range(found.offset, found.offset + found.nbytes, CHUNK_BYTES):
            data = reader.shard_bytes(number, start, min(CHUNK_BYTES, found.offset + found.nbytes - start))
            digest.update(data.data)
            finite.look(number, start, data)
        if digest.hexdigest() != found.digest:
            stop = found.offset + found.nbytes
            findings.fault(
                "digest", name_at(number, found.offset),
                f"bytes {found.offset} to {stop} of {found.shard} have the digest {digest.hexdigest()}, "
                f"{RECORD_NAME} says {found.digest}; they changed after they were written",
            )  # fmt: skip
        return found.nbytes

    return sum(in_threads(compare, jobs, workers))


def is_one_shard(checkpoint: Checkpoint) -> bool:
    """Whether only one of several shards was opened: then nothing can be said about what the others hold."""
    names = [shard.path.name for shard in checkpoint.shards]
    return len(names) == 1 and _OF_SEVERAL.search(names[0]) is not None and not checkpoint.has_index


def _tiles(ranges: Iterable[Range], file_bytes: int, name: str, findings: Findings) -> bool:
    position = 0
    for found in sorted(ranges, key=lambda r: r.offset):
        if found.offset != position or found.nbytes < 0:
            break
        position += found.nbytes
    if position == file_bytes:
        return True
    findings.fault(
        "record",
        name,
        f"has {file_bytes} bytes, of which {RECORD_NAME} knows the first {position}; the file changed after the run",
    )
    return False


def _names_by_offset(checkpoint: Checkpoint) -> Callable[[int, int], str]:
    def name_at(shard: int, offset: int) -> str:
        header = checkpoint.shards[shard]
        at = bisect_right(header.offsets, offset) - 1
        return header.specs[at].name if at >= 0 else f"{header.path.name} (header)"

    return name_at
