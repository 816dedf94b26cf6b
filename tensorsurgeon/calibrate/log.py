"""The record of a calibrated run: one row per module, and what they come to."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from tensorsurgeon.checkpoint.small_files import read_small
from tensorsurgeon.checkpoint.telling import LOG
from tensorsurgeon.errors import CheckpointError

LOG_NAME: Final = LOG
# A million rows: more modules than any model has.
_MAX_BYTES: Final = 256 << 20
_COLUMNS: Final = ("layer", "module", "expert", "method", "tokens", "damp_percent", "loss", "relative_loss", "seconds", "note")


class LogRow(NamedTuple):
    """How one module was quantized.

    ``method``: ``gptq``, ``imatrix``, ``signround`` or ``rtn``. ``loss``: tr(D H D^T) over its calibration tokens, D being the
    change of the weight; ``relative_loss``: that over tr(W H W^T). Empty where no statistics were at hand, and behind SignRound,
    whose note has the layer's error before and after. ``seconds`` are worker time and differ between runs.
    """

    layer: int | None
    module: str
    expert: int | None
    method: str
    tokens: int
    damp_percent: float | None
    loss: float | None
    relative_loss: float | None
    seconds: float
    note: str

    def cells(self) -> list[str]:
        """The row as CSV has it."""
        return [
            _text(self.layer), self.module, _text(self.expert), self.method, str(self.tokens), _text(self.damp_percent),
            _text(self.loss), _text(self.relative_loss), f"{self.seconds:.3f}", self.note,
        ]  # fmt: skip

    @classmethod
    def parse(cls, cells: Sequence[str]) -> LogRow:
        """The row of ``cells``."""
        layer, module, expert, method, tokens, damping, loss, relative, seconds, note = cells
        return cls(
            int(layer) if layer else None, module, int(expert) if expert else None, method, int(tokens),
            _number(damping), _number(loss), _number(relative), float(seconds), note,
        )  # fmt: skip


def rounded_row(layer: int | None, module: str, why: str) -> LogRow:
    """The row of a module that is rounded to nearest because no statistics can be had for it."""
    return LogRow(layer, module, None, "rtn", 0, None, None, None, 0.0, why)


def _number(cell: str) -> float | None:
    return float(cell) if cell else None


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def log_bytes(rows: Sequence[LogRow]) -> bytes:
    """The rows as CSV with a header line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows(row.cells() for row in rows)
    return text.getvalue().encode()


def read_log(path: Path) -> list[LogRow]:
    """The rows of a quant_log.csv; CheckpointError for a file that is none."""
    try:
        lines = list(csv.reader(io.StringIO(read_small(path, _MAX_BYTES)[0].decode(), newline="")))
        return [LogRow.parse(cells) for cells in lines[1:]]
    except (OSError, ValueError, csv.Error) as error:
        raise CheckpointError(f"is no log as surgeon writes it ({error}); remove it", where=str(path)) from error


def summarize(rows: Sequence[LogRow], *, worst: int = 5) -> dict[str, Any]:
    """Shares of methods, why modules were rounded to nearest, the worst modules, cold experts, loss by layer.

    A layer's relative loss is the plain mean over its modules; ``cold_experts`` counts modules of experts that were
    rounded to nearest for want of tokens.
    """
    methods: dict[str, int] = {}
    reasons: dict[str, int] = {}
    by_layer: dict[int, list[float]] = {}
    for row in rows:
        methods[row.method] = methods.get(row.method, 0) + 1
        if row.method == "rtn":
            reasons[row.note] = reasons.get(row.note, 0) + 1
        if row.layer is not None and row.relative_loss is not None:
            by_layer.setdefault(row.layer, []).append(row.relative_loss)
    measured = [row for row in rows if row.relative_loss is not None]
    measured.sort(key=lambda row: (-(row.relative_loss or 0.0), row.module))
    return {
        "modules": len(rows),
        "methods": methods,
        "rtn_reasons": reasons,
        "cold_experts": sum(row.method == "rtn" and row.expert is not None and row.note.startswith("saw") for row in rows),
        "worst": [{"module": row.module, "relative_loss": row.relative_loss, "tokens": row.tokens} for row in measured[:worst]],
        "loss_by_layer": {layer: sum(losses) / len(losses) for layer, losses in sorted(by_layer.items())},
    }


def summary_text(summary: dict[str, Any]) -> str:
    """The summary for a person."""
    total = max(1, summary["modules"])
    shares = ", ".join(f"{count} {name} ({100 * count / total:.1f} %)" for name, count in sorted(summary["methods"].items()))
    lines = [f"{summary['modules']} modules: {shares}"]
    lines += [f"  rounded to nearest: {count} {reason}" for reason, count in sorted(summary["rtn_reasons"].items())]
    for entry in summary["worst"]:
        lines.append(f"  worst: {entry['module']} (relative loss {entry['relative_loss']:.4f}, {entry['tokens']} tokens)")
    losses = summary["loss_by_layer"]
    if losses:
        lines.append("  relative loss by layer: " + ", ".join(f"{layer}: {loss:.4f}" for layer, loss in losses.items()))
    return "\n".join(lines)
