"""What an evaluation came to, as data for programs and cards, and as text for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorsurgeon.checkpoint.sink import publish_bytes
from tensorsurgeon.evaluating.kept import FILE_NAME
from tensorsurgeon.evaluating.predicting import Scores
from tensorsurgeon.evaluating.side import Side
from tensorsurgeon.evaluating.summary import distance, likelihood
from tensorsurgeon.evaluating.text import FEW_SEQUENCES, Text
from tensorsurgeon.planning.report import table
from tensorsurgeon.running.record import add_files
from tensorsurgeon.version import __version__


@dataclass(frozen=True, slots=True)
class Evaluation:
    """``source`` is None where nothing was compared; ``targets`` in the order asked for, each with its ``path``.

    Each has ``name``, ``nll``, ``nll_se`` and ``perplexity``; a compared target also ``kl``, ``kl_se``, ``kl_quantiles``, the
    same with ``reverse_``, ``top1_agreement`` and ``hidden_error``: before the first layer, and after each.
    """

    text: dict[str, Any]
    source: dict[str, Any] | None
    targets: list[dict[str, Any]]
    device: str

    @property
    def notes(self) -> list[str]:
        """What a reader of the figures ought to know."""
        few = self.text["sequences"]
        return [f"{few} sequences are few: the standard errors are themselves uncertain"] if few < FEW_SEQUENCES else []


def evaluation_of(
    sides: Sequence[Side], text: Text, scores: Scores, errors: Sequence[Sequence[float]], *, has_source: bool, device: str
) -> Evaluation:
    """The figures of every model."""
    described = []
    for k, side in enumerate(sides):
        own = scores.predictions[k]
        entry: dict[str, Any] = {"path": side.path, "name": side.name, "inputs": side.inputs_text()}
        entry |= likelihood(own.nll, text.scored)
        if has_source and k:
            source = scores.predictions[0]
            forward, reverse = scores.divergences[k - 1].of(source, own)
            entry |= distance(forward, reverse, own.likeliest == source.likeliest, text.counted)
            entry["hidden_error"] = list(errors[k - 1])
        described.append(entry)
    return Evaluation(text.described, described[0] if has_source else None, described[1:] if has_source else described, device)


def evaluation_as_data(evaluation: Evaluation) -> dict[str, Any]:
    """As ``--json`` prints it."""
    return {
        "tensorsurgeon": __version__,
        "text": evaluation.text,
        "device": evaluation.device,
        "source": evaluation.source,
        "targets": evaluation.targets,
        "notes": evaluation.notes,
    }


def write_evaluations(evaluation: Evaluation) -> list[Path]:
    """``evaluation.json`` beside each target, where card and page look for it; paths of this machine are left out."""
    written = []
    for target in evaluation.targets:
        folder = Path(target["path"])
        if not folder.is_dir():
            continue
        data = evaluation_as_data(evaluation)
        source = None if evaluation.source is None else _without_path(evaluation.source)
        data = {**data, "source": source, "target": _without_path(target)}
        del data["targets"]
        content = json.dumps(data, indent=1).encode() + b"\n"
        publish_bytes(folder / FILE_NAME, content)
        add_files(folder, {FILE_NAME: content})
        written.append(folder / FILE_NAME)
    return written


def _without_path(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "path"}


def evaluation_as_text(evaluation: Evaluation) -> str:
    """One line for each model; for each target also where its states move away."""
    text = evaluation.text
    lines = [f"{text['tokens']} tokens in {text['sequences']} sequences of {text['sequence_length']}, on {evaluation.device}", ""]
    if evaluation.source is None:
        rows = [["", "perplexity", "NLL", "inputs"]]
        rows += [
            [t["name"], _number(t["perplexity"]), _with_error(t["nll"], t["nll_se"]), t["inputs"]] for t in evaluation.targets
        ]
        return "\n".join([*lines, table(rows, right={1}), *_noted(evaluation)])
    rows = [["", "KL(source || it)", "99 %", "max", "reverse KL", "same top token", "perplexity", "NLL", "inputs"]]
    source = evaluation.source
    nothing = [""] * 5
    rows.append([source["name"], *nothing, _number(source["perplexity"]), _with_error(source["nll"], source["nll_se"]), ""])
    for t in evaluation.targets:
        rows.append([
            t["name"], _with_error(t["kl"], t["kl_se"]), f"{t['kl_quantiles']['p99']:.4f}", f"{t['kl_quantiles']['max']:.3f}",
            _with_error(t["reverse_kl"], t["reverse_kl_se"]), f"{t['top1_agreement']:.2%}", _number(t["perplexity"]),
            _with_error(t["nll"], t["nll_se"]), t["inputs"],
        ])  # fmt: skip
    lines.append(table(rows))
    for t in evaluation.targets:
        lines += ["", f"{t['name']}: relative error of hidden states, before the layers and after each", f"  {_states(t)}"]
    return "\n".join([*lines, *_noted(evaluation)])


def _states(target: dict[str, Any]) -> str:
    return " ".join(f"{'in' if k == 0 else k - 1}:{error:.4f}" for k, error in enumerate(target["hidden_error"]))


def _noted(evaluation: Evaluation) -> list[str]:
    return [f"note    {note}" for note in evaluation.notes]


def _number(value: float) -> str:
    return f"{value:.4g}" if value >= 10_000 else f"{value:.4f}"


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.5f}" if error is None else f"{value:.5f} ± {error:.5f}"
