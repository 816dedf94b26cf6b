"""Carry out a plan: prepare the target, run the units, publish, and leave a record."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import xxhash

from tensorsurgeon.checkpoint.folder import RECORD_NAME
from tensorsurgeon.checkpoint.header import read_header
from tensorsurgeon.checkpoint.hub.stays import DEFAULT_AHEAD
from tensorsurgeon.checkpoint.sink import Sink, publish_bytes, publish_copy, refuse_links_below
from tensorsurgeon.checkpoint.source import Source
from tensorsurgeon.errors import HeaderError, Interrupted, PlanViolationError, RecipeError, SinkError, TargetError
from tensorsurgeon.machine.files import make_folder_durable
from tensorsurgeon.machine.limits import available_bytes, open_files_limit, usable_cores
from tensorsurgeon.machine.threads import in_threads
from tensorsurgeon.planning.codes import codes_text
from tensorsurgeon.planning.pace import streaming_of
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.planning.work import Unit
from tensorsurgeon.running.executor import Progress
from tensorsurgeon.running.machines import HERE, Machines
from tensorsurgeon.running.record import record_bytes
from tensorsurgeon.running.target import prepare_target, spool_folder

logger = logging.getLogger(__name__)

# What a run may hold beyond the arrays of its units: interpreter, NumPy, compiled kernels, the plan.
_MIN_RAM_BYTES = 64 << 20


# Journal, lock, standard streams, libraries.
_OTHER_FILES = 40


class RunResult(NamedTuple):
    """What a run did; ``resumed_units`` were found whole from an earlier run."""

    target: Path
    units: int
    resumed_units: int
    was_complete: bool


class Beside(NamedTuple):
    """What is put beside a checkpoint once it can be read: ``write`` does it, before the run counts as finished, and
    ``files`` are all that it may write, so that a run that dies there is known to have written them."""

    files: tuple[str, ...] = ()
    write: Callable[[], None] = lambda: None


NOTHING_BESIDE: Final = Beside()


def default_max_ram_bytes() -> int:
    """Half of what machine and container can give."""
    return available_bytes() // 2


def run_plan(
    plan: Plan,
    target: str | os.PathLike[str],
    *,
    workers: int | None = None,
    max_ram_bytes: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    stop: threading.Event | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    machines: Machines = HERE,
    execute: Callable[..., dict[int, list[str]]] | None = None,
    command: Sequence[str] = (),
    ahead: int = DEFAULT_AHEAD,
    keep_source: bool = False,
    beside: Beside = NOTHING_BESIDE,
    least_bytes: int = 0,
) -> RunResult:
    """Write the planned checkpoint into the folder ``target``; ``machines`` run its units, in the order that ``execute``
    decides, which is given what ``machines.run_units`` is given and takes its place.

    ``command`` is what a person typed: transform, source and options; a stopped run keeps it with the folder it was typed in,
    so that it can be continued without typing it again.

    A source on the Hub is fetched while the run lasts, ``ahead`` shards before they are read; each goes when all that reads
    it is done, unless ``keep_source`` has it in the Hub's cache, where it stays.

    ``least_bytes`` is what each of several machines has to have room for, where units are not all that it does.

    Neither ``workers`` nor ``max_ram_bytes`` changes a byte of it. Raises TargetError before anything is written
    if the folder cannot be used, ExecutionError if the run stops, which ``resume`` then continues.
    """
    if plan.needs_codes and not plan.calibration:
        # Rounding to nearest instead would be the silent kind of garbage.
        raise RecipeError("a step chooses codes by calibration (method gptq, imatrix or signround); give data to calibrate on")
    if not os.fspath(target):
        # Of a variable of the shell that was never set; a path of nothing is the current folder.
        raise TargetError("TARGET is empty; name a folder, or . for this one")
    if plan.written:
        logger.info("%s", codes_text(plan))
    target, stop = Path(target), stop or threading.Event()
    budget = default_max_ram_bytes() if max_ram_bytes is None else max_ram_bytes
    plan.check_budget(max(budget, _MIN_RAM_BYTES) if max_ram_bytes is None else budget)
    plan.source.refuse_changes()
    _check_open_files(plan)
    threads = workers or usable_cores()
    streaming = None if keep_source else streaming_of(plan, ahead)
    prepared = prepare_target(
        plan,
        target,
        resume=resume,
        overwrite=overwrite,
        workers=threads,
        command=command,
        beside=beside.files,
        spool_bytes=0 if streaming is None else streaming.spool_bytes,
        before=lambda: machines.check(plan, target, least_bytes),
    )
    if prepared is None:
        return RunResult(target, len(plan.units), len(plan.units), True)
    journal, claimed = prepared
    spool = None if keep_source else spool_folder(target)
    with journal, _source_of(plan, spool, ahead, stop) as source:
        # A run killed while it published may have left an index: no index may lead to shards that are reopened.
        (target / plan.layout.index_name).unlink(missing_ok=True)
        sink = Sink(target, plan.layout)
        try:
            sink.open()
            done = _trusted(plan, sink, claimed, progress, threads, stop)
            digests = (execute or machines.run_units)(
                plan,
                source,
                sink,
                journal,
                done=done,
                workers=threads,
                max_ram_bytes=budget,
                stop=stop,
                progress=progress,
            )
            _publish(plan, sink, target, digests)
        finally:
            sink.close()
        source.discard()
        beside.write()
        journal.remove()
    return RunResult(target, len(plan.units), len(done), False)


def _source_of(plan: Plan, spool: Path | None, ahead: int, stop: threading.Event) -> Source:
    """The shards of the source, which are fetched into ``spool`` where they lie on the Hub."""
    if plan.source.snapshot is None:
        return Source(plan.source)
    from tensorsurgeon.checkpoint.hub.spool import SpooledSource

    return SpooledSource(plan.source, plan.source.snapshot, spool, ahead=ahead, stop=stop)


def _check_open_files(plan: Plan) -> None:
    """Every shard is open at once while a run lasts; refuse what this process may not open, before anything is written."""
    needed = len(plan.source.shards) + len(plan.layout.shards) + _OTHER_FILES
    allowed = open_files_limit()
    if needed > allowed:
        raise TargetError(
            f"source and output have {len(plan.source.shards)} and {len(plan.layout.shards)} shards, all open at once, and this "
            f"process may open {allowed} files; allow more (ulimit -n {needed})",
            remedy=", or give a larger {max_shard_size}",
        )


def _trusted(
    plan: Plan,
    sink: Sink,
    claimed: dict[int, list[str]],
    progress: Callable[[Progress], None],
    workers: int,
    stop: threading.Event,
) -> dict[int, list[str]]:
    """The journalled units whose bytes on disk still have their digests; the others are done again."""

    def is_there(number: int) -> bool:
        return (
            not stop.is_set() and 0 <= number < len(plan.units) and _digests_on_disk(plan.units[number], sink) == claimed[number]
        )

    done = {}
    for number, is_whole in zip(claimed, in_threads(is_there, claimed, workers), strict=True):
        if is_whole:
            done[number] = claimed[number]
            progress(Progress(plan.units[number].written_bytes))
    if stop.is_set():
        raise Interrupted("stopped while the work of the run before was looked at; what is done is kept")
    return done


def _digests_on_disk(unit: Unit, sink: Sink) -> list[str]:
    places = [(w.shard, w.offset, w.nbytes) for w in unit.writes] + [(c.shard, c.offset, c.nbytes) for c in unit.copies]
    found = []
    buffer = memoryview(bytearray(1 << 20))
    for shard, offset, nbytes in places:
        digest = xxhash.xxh3_64()
        done = 0
        while done < nbytes and (count := sink.read(shard, offset + done, buffer[: nbytes - done])):
            digest.update(buffer[:count])
            done += count
        found.append(digest.hexdigest())
    return found


def _publish(plan: Plan, sink: Sink, target: Path, digests: dict[int, list[str]]) -> None:
    """Make the output visible: what a reader looks for last comes last."""
    sink.sync()
    _check_headers(plan, target)
    plan.source.refuse_changes()
    single = plan.layout.index_json is None
    if not single:
        sink.publish_shards()
    refuse_links_below(target, (*plan.files.copied, *plan.files.contents))
    for name in plan.files.copied:
        if name not in plan.extra_files:
            publish_copy(plan.source.root / name, target / name)
    for name, content in plan.files.contents.items():
        publish_bytes(target / name, content)
    publish_bytes(target / RECORD_NAME, record_bytes(plan, digests, target))
    if plan.layout.index_json is not None:
        # Index last: its presence means that the checkpoint is complete.
        publish_bytes(target / plan.layout.index_name, plan.layout.index_json)
        make_folder_durable(target)
    else:
        sink.publish_shards()


def _check_headers(plan: Plan, target: Path) -> None:
    """Read back what readers will read first; a header that differs from the plan must never be published."""
    for shard in plan.layout.shards:
        try:
            header = read_header(target / f"{shard.name}.partial")
        except HeaderError as error:
            raise SinkError(
                f"was written and is gone or changed before it was published ({error.message}); another program works in this "
                "folder",
                where=error.where,
                remedy="; end that and run the same command with {resume}",
            ) from error
        if header.specs != shard.specs:
            raise PlanViolationError(
                f"{shard.name}: the header on disk is not the planned one; the disk or another program changed it"
            )
