"""The whole judgement: structure, digests, description, values, and the source where one is given."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorsurgeon.checkpoint.folder import RECORD_NAME, Checkpoint, open_checkpoint
from tensorsurgeon.checkpoint.tensor_reader import TensorReader
from tensorsurgeon.errors import CheckpointError, SurgeonError
from tensorsurgeon.machine.limits import usable_cores
from tensorsurgeon.verifying.against import dropped_by_record
from tensorsurgeon.verifying.coded_stacks import check_coded_stacks
from tensorsurgeon.verifying.comparing import compare_pairs, pair_by_content
from tensorsurgeon.verifying.described import Described, check_config_copies, check_described
from tensorsurgeon.verifying.dialects import quantization_of, read_claims
from tensorsurgeon.verifying.fidelity import Fidelity
from tensorsurgeon.verifying.findings import Fault, Findings, Note
from tensorsurgeon.verifying.finite import FiniteCheck
from tensorsurgeon.verifying.model_sizes import Contradiction, check_model_sizes, contradictions_of
from tensorsurgeon.verifying.planned import pair_by_plan
from tensorsurgeon.verifying.recipes import recorded_calls, replayed
from tensorsurgeon.verifying.siblings import check_expert_shapes, check_experts, check_global_scales, check_siblings
from tensorsurgeon.verifying.side_files import check_files_against, check_readable, check_recorded_files
from tensorsurgeon.verifying.stacks import pair_with_stacks
from tensorsurgeon.verifying.structure import check_digests, is_one_shard, open_for_judgement, read_record_to_judge
from tensorsurgeon.verifying.values import check_values

Progress = Callable[[int], None]
# Scales that calibration adds to float modules; a source never has them.
_CALIBRATED = ("k_scale", "v_scale", "q_scale", "prob_scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was found. ``quantization`` says what the config claims, None without one; ``schemes`` counts sound
    quantized modules under each scheme. ``digested_bytes`` is None without a record; ``equal_bytes``, ``compared``
    and ``source`` are of the comparison with a source, where there was one."""

    path: Path
    tensors: int
    nbytes: int
    quantization: str | None
    schemes: dict[str, int]
    digested_bytes: int | None
    source: Path | None
    equal_bytes: int
    compared: tuple[Fidelity, ...]
    faults: tuple[Fault, ...]
    notes: tuple[Note, ...]

    @property
    def is_sound(self) -> bool:
        """Whether no fault was found; notes do not count."""
        return not self.faults


def bytes_to_read(target: str | os.PathLike[str], against: str | os.PathLike[str] | None) -> int:
    """About how many bytes ``verify`` will read; for a progress bar."""
    try:
        checkpoint = open_checkpoint(target, tolerant=True)
        total = checkpoint.weight_bytes if (checkpoint.root / RECORD_NAME).exists() else 0
        if against is not None:
            total += checkpoint.weight_bytes + open_checkpoint(against).weight_bytes
    except SurgeonError:
        # ``verify`` says what is wrong.
        return 0
    return total


def verify(
    target: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    workers: int | None = None,
    progress: Progress = lambda _: None,
) -> Verification:
    """Judge the checkpoint ``target``, and with ``against`` compare it with the source it was made from.

    Every fault is collected; CheckpointError only where one of the two is no checkpoint at all. ``workers`` threads
    each hold some tens of megabytes (one packed tensor, for layouts that are stored transposed).
    """
    count = workers or usable_cores()
    findings = Findings()
    source = None if against is None else open_checkpoint(against)
    checkpoint = open_for_judgement(Path(target), findings)
    if checkpoint is None:
        return _result(Path(target), None, None, Described({}, {}), None, source, 0, (), findings)
    if is_one_shard(checkpoint):
        return _judge_shard(Path(target), checkpoint, source, findings, count, progress)
    with ExitStack() as stack:
        reader = stack.enter_context(TensorReader(checkpoint, progress=progress))
        record = read_record_to_judge(checkpoint.root, findings)
        claims = read_claims(checkpoint.specs, findings)
        # Where the config cannot be read, faults say so already, and judging modules by it would only repeat them.
        readable = claims is not None or quantization_of(checkpoint.config) is None
        described = check_described(reader, claims, findings, known_method=readable)
        digested = _check_bytes(reader, record, described, findings, count)
        # As many ranges as tensors, which nothing below asks for.
        record = None if record is None else {key: value for key, value in record.items() if key != "shards"}
        check_config_copies(checkpoint, findings)
        check_readable(checkpoint, findings)
        check_siblings(checkpoint.specs, described, findings)
        check_experts(checkpoint.specs, checkpoint.specs.config_value, findings)
        check_expert_shapes(checkpoint.specs, described, findings)
        check_coded_stacks(reader, findings, count)
        global_scales = check_values(reader, described.modules.values(), findings, count)
        check_global_scales(checkpoint.specs, global_scales, findings)
        if digested is not None and not any(fault.kind in ("digest", "record") for fault in findings.faults):
            findings.excuse("zero-scale", {fault.where for fault in findings.faults}, "the run wrote them so")
        equal = 0
        compared: list[Fidelity] = []
        inherited: tuple[Contradiction, ...] = ()
        if source is not None:
            original = stack.enter_context(TensorReader(source, progress=progress))
            modules = _modules_of(original)
            inherited = contradictions_of(source.specs, modules)
            compared, equal = _check_against(original, modules, reader, described, record, findings, count)
            check_files_against(source, checkpoint, findings)
            close = {fidelity.name for fidelity in compared if fidelity.is_sound}
            named = {f"{name}.{module.claim.scale_name}" for name, module in described.modules.items() if name in close}
            findings.excuse("zero-scale", named, "they are next to nothing in the source too")
        check_model_sizes(checkpoint.specs, described, findings, inherited)
    label = None if claims is None else claims.label
    return _result(Path(target), checkpoint, label, described, digested, source, equal, compared, findings)


def _judge_shard(
    path: Path, checkpoint: Checkpoint, source: Checkpoint | None, findings: Findings, workers: int, progress: Progress
) -> Verification:
    """One shard of several: its header and digests; scales and experts may lie in any of the others."""
    if source is not None:
        raise CheckpointError(
            "is one of several shards, and a source can only be compared with all of them; give the folder", where=str(path)
        )
    findings.note("one-shard", path.name, "is one of several shards, so only its header and digests were judged")
    with TensorReader(checkpoint, progress=progress) as reader:
        record = read_record_to_judge(checkpoint.root, findings)
        digested = _check_bytes(reader, record, Described({}, {}), findings, workers)
    return _result(path, checkpoint, None, Described({}, {}), digested, None, 0, (), findings)


def _check_bytes(
    reader: TensorReader, record: dict[str, Any] | None, described: Described, findings: Findings, workers: int
) -> int | None:
    """Digests of shards and files where a record has them, and in the same pass whether floats are numbers."""
    finite = FiniteCheck(reader, described.stored)
    if record is None:
        digested = None
        finite.rest(range(len(reader.checkpoint.shards)), workers)
    else:
        digested = check_digests(reader, record, finite, findings, workers)
        check_recorded_files(reader.checkpoint, record, findings)
    finite.report(findings)
    return digested


def _modules_of(original: TensorReader) -> Described:
    """The quantized modules of a source that are sound. Its faults are not those of the checkpoint made from it."""
    own, source = Findings(), original.specs
    return check_described(original, read_claims(source, own), own, known_method=quantization_of(source.config) is not None)


def _check_against(
    original: TensorReader,
    source_modules: Described,
    reader: TensorReader,
    described: Described,
    record: dict[str, Any] | None,
    findings: Findings,
    workers: int,
) -> tuple[list[Fidelity], int]:
    """Compare with the source: as the recorded recipe says where there is one, else by names and contents."""
    calls = None if record is None else recorded_calls(record, findings)
    replay = None if record is None or calls is None else replayed(calls, record, original.checkpoint, findings)
    if replay is not None:
        pairing = pair_by_plan(replay, original, source_modules, reader, described, findings)
    else:
        pairing = pair_with_stacks(original, source_modules, reader.specs, described, findings)
    compared, equal = compare_pairs(original, reader, pairing.pairs, findings, workers)
    lost, new = pairing.lost, pairing.new
    if replay is None:
        lost, new = pair_by_content(original, reader, lost, new, findings)
    reasons = dropped_by_record(calls or [], lost)
    for spec in lost:
        if spec.name in reasons:
            findings.note("dropped", spec.name, f"left out by a {reasons[spec.name]} step of surgeon.json")
        else:
            findings.fault(
                "lost", spec.name, f"the source has {spec.dtype.name}{list(spec.shape)}, and nothing here stands for it"
            )
    for spec in new:
        shown = f"{spec.dtype.name}{list(spec.shape)}"
        if replay is not None:
            findings.fault("new", spec.name, f"{shown} is nothing that the recorded recipe makes")
        elif spec.name.rpartition(".")[2] in _CALIBRATED:
            findings.note("new", spec.name, f"{shown} is not in the source")
        else:
            findings.fault("new", spec.name, f"{shown} comes from no tensor of the source")
    return compared, equal


def _result(
    path: Path, checkpoint: Checkpoint | None, label: str | None, described: Described, digested: int | None,
    source: Checkpoint | None, equal: int, compared: list[Fidelity] | tuple[Fidelity, ...], findings: Findings,
) -> Verification:  # fmt: skip
    return Verification(
        path=path if checkpoint is None or checkpoint.snapshot is None else Path(str(checkpoint)),
        tensors=0 if checkpoint is None else len(checkpoint.specs),
        nbytes=0 if checkpoint is None else checkpoint.weight_bytes,
        quantization=label,
        schemes=dict(Counter(module.claim.describe() for module in described.modules.values())),
        digested_bytes=digested,
        source=None if source is None else Path(str(source)),
        equal_bytes=equal,
        compared=tuple(sorted(compared, key=lambda f: f.name)),
        faults=findings.faults,
        notes=findings.notes,
    )
