"""What plans and runs look like to a reader, as text and as plain data for ``--json``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from tensorsurgeon.checkpoint.hub.stays import DEFAULT_AHEAD
from tensorsurgeon.formats.coding import Written, stored_in, written_by
from tensorsurgeon.formats.scales import INPUT_SCALES
from tensorsurgeon.models.describe import describe_model
from tensorsurgeon.models.experts import any_expert, is_expert_list
from tensorsurgeon.models.floats import unquantized_linears
from tensorsurgeon.models.fused import describe
from tensorsurgeon.models.roles import Role
from tensorsurgeon.models.selecting import why_left
from tensorsurgeon.planning.codes import codes_text
from tensorsurgeon.planning.pace import streaming_of
from tensorsurgeon.planning.plan import Plan
from tensorsurgeon.planning.rewriting import Rewrite, details_of, is_reversible, op_name
from tensorsurgeon.tensors.sizes import show_size
from tensorsurgeon.tensors.spec import TensorSpec

# A cell longer than that stands over its column, instead of making all others as wide.
_WIDEST = 120
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def grouped_name(name: str) -> str:
    """A name with its numbers masked, so that a thousand experts are one line: ``layers.*.experts.*.up_proj``."""
    # Most names are another expert's, and differ in one number only.
    return _masked(any_expert(name) or name)


@lru_cache(maxsize=1 << 14)
def _masked(name: str) -> str:
    return _NUMBER.sub("*", name)


def group_specs(specs: Iterable[TensorSpec]) -> list[dict[str, Any]]:
    """Tensors that differ only in their numbers, as one entry each: pattern, count, dtype, shape, bytes."""
    counts = Counter([(grouped_name(name), dtype, shape) for name, dtype, shape in specs])
    return [
        {
            "pattern": pattern,
            "count": count,
            "dtype": dtype.name,
            "shape": list(shape),
            "bytes": count * TensorSpec(pattern, dtype, shape).nbytes,
        }
        for (pattern, dtype, shape), count in counts.items()
    ]


class Table(str):
    """Text of several lines, in which each cell is one line whatever is in it."""

    __slots__ = ()


def document(parts: Iterable[str]) -> str:
    """Parts below each other: tables, and lines that stay one line each, for a name may hold what would begin another."""
    return "\n".join(part if isinstance(part, Table) else _in_one_line(part) for part in parts)


def _in_one_line(text: str) -> str:
    return text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def table(rows: list[list[str]], right: set[int] = frozenset()) -> Table:  # type: ignore[assignment]
    """Rows in aligned columns; the columns numbered in ``right`` are aligned to the right."""
    if not rows:
        return Table()
    rows = [[_in_one_line(cell) for cell in row] for row in rows]
    widths = [max(min(len(row[i]), _WIDEST) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return Table("\n".join(line.rstrip() for line in lines))


def plan_as_data(plan: Plan, *, ahead: int = DEFAULT_AHEAD, keep_source: bool = False) -> dict[str, Any]:
    """Everything ``surgeon plan`` says, as plain data; ``ahead`` and ``keep_source`` are those of the run that is thought of."""
    kept = unquantized_linears(plan.specs, plan.quantized)
    counted = _counted_linears(plan, kept)
    inputs = {spec.name for spec in plan.source.specs.values()}
    streaming = streaming_of(plan, ahead)
    steps = plan.step_names()
    return {
        "family": describe_model(plan.source.specs).known_by,
        "dequantized": _dequantized(plan),
        "source": {
            "path": str(plan.source),
            "tensors": len(plan.source.specs),
            "bytes": plan.source.weight_bytes,
            "shards": len(plan.source.shards),
        },
        "output": {
            "tensors": len(plan.specs),
            "bytes": plan.output_bytes,
            "shards": [{"name": s.name, "bytes": s.file_bytes, "tensors": len(s.specs)} for s in plan.layout.shards],
        },
        "quantized_linears": len(plan.quantized),
        "linears": len(plan.quantized) + len(counted),
        "methods": dict(Counter(written.method for written in plan.written.values())),
        "quantized": _counted(plan.quantized),
        "unquantized": _counted(kept),
        "why_unquantized": _reasons(plan, kept, [made for _, made in steps]),
        "passed_through": len(inputs.difference(*(read for read, _ in steps))),
        "copied_bytes": plan.copied_bytes,
        "peak_unit_bytes": plan.peak_unit_bytes,
        "disk_bytes": plan.disk_bytes,
        "streaming": None if streaming is None else {**streaming._asdict(), "kept": keep_source},
        "steps": [
            {"op": op_name(step), "read": len(read), "made": len(made), "recipe": repr(step)}
            for step, (read, made) in zip(plan.steps, steps, strict=True)
        ],
        "dropped": _dropped(plan),
        "files_written": sorted(plan.files.contents),
        "files_copied": list(plan.files.copied),
        "left_behind": list(plan.source.left_behind),
        "stale_files": list(plan.files.stale),
        "oddities": [str(oddity) for oddity in plan.source.oddities],
        "tensors": group_specs(plan.specs.values()),
        "one_way_steps": one_way_steps(plan),
    }


def _counted_linears(plan: Plan, kept: Iterable[str]) -> list[str]:
    """As the model cards count: nn.Linear modules, so neither routers nor stacks nor the MTP head, which no class has."""
    model = describe_model(plan.specs)
    uses = ((module, model.module_use(module)) for module in kept if not is_expert_list(module))
    return [module for module, use in uses if use.role is not Role.MTP and use.kind is not Role.ROUTER]


def _reasons(plan: Plan, modules: Iterable[str], made_by_steps: list[set[str]]) -> dict[str, str]:
    """For each form of module that stays unquantized: which rule kept it out, where a step can tell."""
    quantizing = {number: written for number, rewrites in enumerate(plan.rewrites) for written in _written(rewrites)}
    examples = {grouped_name(module): module for module in reversed(list(modules))} if quantizing else {}
    reasons = {}
    for form, module in examples.items():
        # Stacked experts have no tensor called weight.
        name = f"{module}.weight" if f"{module}.weight" in plan.specs else f"{module}.down_proj"
        # A later step's name for it is not the one that the rules were matched with.
        if not any(name in made for made in made_by_steps[min(quantizing) :]):
            reasons[form] = "; ".join(dict.fromkeys(why_left(plan.specs, name, w.where, w.exclude) for w in quantizing.values()))
    return reasons


def _written(rewrites: Sequence[Rewrite]) -> list[Written]:
    """How a step that chooses among weights writes them: the first of its ways stands for all."""
    first = next((written for detail in details_of(rewrites) if (written := written_by(detail)) is not None), None)
    return [first] if first is not None and first.where else []


def _counted(modules: Iterable[str]) -> dict[str, int]:
    return dict(Counter(map(grouped_name, modules)))


def _dropped(plan: Plan) -> dict[str, int]:
    names = (
        region.spec.name for rewrites in plan.rewrites for rewrite in rewrites if not rewrite.outputs for region in rewrite.inputs
    )
    return _counted(names)


def _dequantized(plan: Plan) -> dict[str, int]:
    """The formats that are unpacked and not written again as they are, in words, with how many modules each has."""
    counts: dict[str, set[str]] = {}
    reading = (rewrites for rewrites in plan.rewrites if any(map(stored_in, details_of(rewrites))))
    for rewrite in (rewrite for rewrites in reading for rewrite in rewrites):
        stored = stored_in(rewrite.detail)
        if stored is None or written_by(rewrite.detail) is not None:
            continue
        gone = [name for name in stored.names if name in INPUT_SCALES]
        text = f"{stored.format.name} ({describe(stored.scheme)})"
        if gone:
            text += f"; {' and '.join(gone)} of their inputs dropped"
        counts.setdefault(text, set()).update(region.spec.name for region in rewrite.outputs)
    return {text: len(names) for text, names in counts.items()}


def one_way_steps(plan: Plan) -> list[str]:
    """Steps whose work nothing can undo."""
    return [
        op_name(step) for step, rewrites in zip(plan.steps, plan.rewrites, strict=True) if rewrites and not is_reversible(step)
    ]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def streaming_as_text(stream: dict[str, Any]) -> str:
    """What is fetched of a source on the Hub, in a line."""
    twice = stream["twice"]
    if not stream["shards"]:
        return "fetch   nothing: every shard of the source is in the Hub's cache"
    if stream["kept"]:
        return (
            f"fetch   {stream['shards']} shards, {show_size(stream['fetched_bytes'])} from the Hub (ahead {stream['ahead']}); "
            "they stay in the Hub's cache"
        )
    return (
        f"fetch   {stream['shards']} shards, {show_size(stream['fetched_bytes'])} from the Hub; at most "
        f"{show_size(stream['spool_bytes'])} of them lie beside the output at once (ahead {stream['ahead']})"
        + (f"; {len(twice)} come twice, for layers are walked first: {_few(twice)}" if twice else "")
    )


def plan_as_text(plan: Plan, free_bytes: int | None = None, *, ahead: int = DEFAULT_AHEAD, keep_source: bool = False) -> str:
    """The plan for a reader: what happens to which tensors, how large the result is, what it takes."""
    data = plan_as_data(plan, ahead=ahead, keep_source=keep_source)
    lines = [
        f"source  {data['source']['path']}: {data['source']['tensors']} tensors, "
        f"{show_size(data['source']['bytes'])} in {data['source']['shards']} shards",
        f"family  {data['family']}",
        *(f"read as {what}: {count} modules, dequantized on the way" for what, count in data["dequantized"].items()),
        "steps   " + ", ".join(f"{s['op']} {s['read']} -> {s['made']}" for s in data["steps"] if s["read"]),
    ]
    if plan.quantized:
        lines += ["", f"quantized: {data['quantized_linears']} of {data['linears']} linears (routers and MTP head not counted)"]
        lines += [f"codes   {codes_text(plan)}"]
        lines.append(table([["  " + name, f"x {count}"] for name, count in data["quantized"].items()]))
        lines += ["not quantized:"]
        reasons = data["why_unquantized"]
        lines.append(table([["  " + name, f"x {n}", reasons.get(name, "")] for name, n in data["unquantized"].items()]))
    if data["dropped"]:
        lines += ["", "dropped:", table([["  " + name, f"x {count}"] for name, count in data["dropped"].items()])]
    lines += ["", "output tensors:"]
    lines.append(
        table(
            [
                ["  " + t["pattern"], f"x {t['count']}", t["dtype"], str(t["shape"]), show_size(t["bytes"])]
                for t in data["tensors"]
            ],
            right={4},
        )
    )
    shards = data["output"]["shards"]
    stream = data["streaming"]
    room = "" if free_bytes is None else f" ({show_size(free_bytes)} free in the current folder)"
    lines += [
        "",
        f"output  {data['output']['tensors']} tensors, {show_size(data['output']['bytes'])} in {len(shards)} shards, "
        f"{show_size(data['copied_bytes'])} of it copied unchanged ({data['passed_through']} tensors)",
        f"disk    {show_size(data['disk_bytes'])} needed{room}",
        *([] if stream is None else [streaming_as_text(stream)]),
        f"memory  {show_size(data['peak_unit_bytes'])} per worker at most, for the largest piece of work",
        f"files   written: {', '.join(data['files_written']) or 'none'}; copied: {len(data['files_copied'])}",
    ]
    if data["one_way_steps"]:
        lines.append(f"one-way {', '.join(data['one_way_steps'])}: these steps cannot be undone")
    for name in data["stale_files"]:
        lines.append(f"note    {name} stays behind: it was made to tell of the source alone")
    for name in data["left_behind"]:
        lines.append(f"note    {name} stays behind: it holds other weights than this checkpoint's")
    for oddity in data["oddities"]:
        lines.append(f"note    {oddity}")
    return document(lines)
