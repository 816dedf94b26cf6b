"""What is in a checkpoint, from headers and small files alone: the answer to "what did I download?"."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from tensorsurgeon.checkpoint.folder import STATE_FOLDER, Checkpoint, open_checkpoint
from tensorsurgeon.errors import SurgeonError
from tensorsurgeon.models.describe import describe_model
from tensorsurgeon.models.floats import unquantized_linears
from tensorsurgeon.planning.report import document, group_specs, grouped_name, table
from tensorsurgeon.running.record import read_record
from tensorsurgeon.tensors.sizes import show_size
from tensorsurgeon.tensors.spec import SpecMap
from tensorsurgeon.verifying.described import tensors_by_module
from tensorsurgeon.verifying.dialects import quantization_of, read_claims
from tensorsurgeon.verifying.findings import Findings
from tensorsurgeon.verifying.layouts import is_stored_quantized


def inspect_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Everything ``surgeon inspect`` says, as plain data; CheckpointError for what cannot be read at all."""
    checkpoint = open_checkpoint(path, tolerant=True)
    dtypes: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for spec in checkpoint.specs.values():
        dtypes[spec.dtype.name][0] += 1
        dtypes[spec.dtype.name][1] += spec.nbytes
    config = checkpoint.config
    quantization, oddities = _quantization(checkpoint)
    return {
        "path": str(path),
        "model_type": config.get("model_type"),
        "architectures": config.get("architectures"),
        "tensors": len(checkpoint.specs),
        "bytes": checkpoint.weight_bytes,
        "dtypes": {
            name: {"tensors": count, "bytes": nbytes} for name, (count, nbytes) in sorted(dtypes.items(), key=lambda d: -d[1][1])
        },
        "shards": [{"name": s.path.name, "bytes": s.file_bytes, "tensors": len(s.specs)} for s in checkpoint.shards],
        "has_index": checkpoint.has_index,
        "family": describe_model(checkpoint.specs).known_by,
        "groups": _groups(checkpoint.specs),
        "quantization": quantization,
        "made_by": _made_by(checkpoint),
        "metadata": checkpoint.metadata,
        "side_files": list(checkpoint.side_files),
        "left_behind": list(checkpoint.left_behind),
        "unfinished": Path(path).is_dir() and (checkpoint.root / STATE_FOLDER).is_dir(),
        "oddities": [*map(str, checkpoint.oddities), *oddities],
    }


def _groups(specs: SpecMap) -> list[dict[str, Any]]:
    """Tensors that differ in their numbers only, with what they are for."""
    model = describe_model(specs)
    roles: dict[str, dict[str, None]] = defaultdict(dict)
    for name in specs:
        roles[grouped_name(name)][str(model.use(name))] = None
    return [{**group, "role": " or ".join(roles[group["pattern"]])} for group in group_specs(specs.values())]


def _quantization(checkpoint: Checkpoint) -> tuple[dict[str, Any] | None, list[str]]:
    """What config and tensors say of quantization, and where they contradict each other; None if neither does."""
    findings = Findings()
    claims = read_claims(checkpoint.specs, findings)
    stored = [name for name, tensors in tensors_by_module(checkpoint.specs).items() if is_stored_quantized(tensors)]
    config = quantization_of(checkpoint.config)
    oddities = [str(f) for f in (*findings.faults, *findings.notes)]
    if config is None and not stored:
        return None, oddities
    schemes: Counter[str] = Counter()
    silent = []
    for module in stored:
        claim = None if claims is None else claims.of(module)
        if claim is None:
            silent.append(module)
        else:
            schemes[claim.describe()] += 1
    if silent and (claims is not None or config is None):
        oddities.append(
            f"{silent[0]} and {len(silent) - 1} more are stored quantized, but the config does not say so"
            if len(silent) > 1
            else f"{silent[0]} is stored quantized, but the config does not say so"
        )
    if config is not None and not stored:
        oddities.append("config.json has a quantization_config, but no module is stored quantized")
    method = config.get("quant_method") if isinstance(config, dict) else None
    linears = unquantized_linears(checkpoint.specs, dict.fromkeys(stored))
    return {
        "method": method,
        "config": None if claims is None else claims.label,
        "modules": len(stored),
        "schemes": dict(schemes),
        "quantized": dict(Counter(map(grouped_name, stored))),
        "unquantized_linears": dict(Counter(map(grouped_name, linears))),
    }, oddities


def _words(value: Any) -> list[str]:
    """The words of a list that should hold words; a config may hold anything."""
    return [word for word in value if isinstance(word, str)] if isinstance(value, list) else []


def _made_by(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The version and recipe of this program, if it wrote the checkpoint."""
    try:
        record = read_record(checkpoint.root)
    except SurgeonError as error:
        return {"error": error.message}
    return None if record is None else {"version": record.get("tensorsurgeon"), "recipe": record.get("recipe")}


def inspection_as_text(data: dict[str, Any]) -> str:
    """The same for a reader."""
    names = ", ".join(_words(data["architectures"])) or str(data["model_type"] or "no config.json")
    shards = data["shards"]
    lines = [
        f"{data['path']}: {names}",
        f"{data['tensors']} tensors, {show_size(data['bytes'])} in {len(shards)} shard{'s' if len(shards) != 1 else ''}"
        + ("" if data["has_index"] or len(shards) == 1 else " without an index"),
    ]
    lines.append(f"family: {data['family']}")
    lines.append(table([["  " + n, f"x {d['tensors']}", show_size(d["bytes"])] for n, d in data["dtypes"].items()], right={1, 2}))
    quantization = data["quantization"]
    if quantization is not None:
        lines.append(
            f"quantization: {quantization['config'] or quantization['method'] or 'none in config.json'}, "
            f"{quantization['modules']} modules"
        )
        lines += [f"  x {count}  {scheme}" for scheme, count in quantization["schemes"].items()]
    lines += [
        "",
        table(
            [
                ["  " + g["pattern"], f"x {g['count']}", g["dtype"], str(g["shape"]), show_size(g["bytes"]), g["role"]]
                for g in data["groups"]
            ],
            right={1, 4},
        ),
        "",
    ]
    if data["made_by"] is not None and "recipe" in data["made_by"]:
        lines.append(f"made by tensorsurgeon {data['made_by']['version']}")
    lines.append(f"files   {', '.join(data['side_files']) or 'none besides'}")
    if data["unfinished"]:
        lines.append(f"note    an unfinished run of surgeon lies in {STATE_FOLDER}/; finish it with surgeon resume")
    lines += [f"note    {name} holds weights that are no part of this checkpoint" for name in data["left_behind"]]
    lines += [f"note    {oddity}" for oddity in data["oddities"]]
    return document(lines).rstrip()
