"""The generated part of a card, section by section: Markdown from what is known of how a checkpoint was made."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from tensorsurgeon.planning.codes import NAMED_AS_ALGORITHMS
from tensorsurgeon.tensors.sizes import show_size
from tensorsurgeon.version import __version__

METHODS: Final = {
    "rtn": "rounded to nearest (RTN), without calibration",
    "gptq": "chosen by GPTQ on calibration data",
    "signround": "chosen by SignRound on calibration data",
    "kept": "those that the original has, in another layout",
    "imatrix": "chosen with weighted errors (importance matrix) on calibration data",
}


class Known:
    """Everything a card is made from; what is None is not known, and its section says so or is left out."""

    def __init__(
        self,
        *,
        name: str,
        made: Mapping[str, Any] | None,
        record: Mapping[str, Any] | None,
        log: Mapping[str, Any] | None,
        evaluation: Mapping[str, Any] | None,
        verification: Mapping[str, Any] | None,
        digest: str | None,
    ) -> None:
        self.name, self.made, self.record, self.log = name, made, record, log
        self.evaluation, self.verification, self.digest = evaluation, verification, digest


def card_text(known: Known, base: str | None) -> str:
    """The whole generated part, without its markers."""
    sections = [
        _head(known, base),
        _section("What was quantized", _quantized(known)),
        _section("How it was made", _how(known)),
        _section("How far it is from the original", _evidence(known)),
        _section("Serving it", _serving(known)),
        _section("Known limits", _limits(known)),
        _section("Checking it", _hashes(known)),
    ]
    return "\n\n".join(section for section in sections if section)


def _section(title: str, lines: Iterable[str]) -> str:
    body = "\n".join(lines).strip("\n")
    return f"## {title}\n\n{body}" if body else ""


def _head(known: Known, base: str | None) -> str:
    of = f"[{base}](https://huggingface.co/{base})" if base and "/" in base else base or "its original"
    made = known.made
    if made is None:
        return f"# {(base or known.name).rpartition('/')[2]}, quantized\n\nA quantized version of {of}."
    sizes = f"{show_size(made['output']['bytes'])}, of {show_size(made['source']['bytes'])}"
    kinds = " and ".join(f"{s['format']} ({s['scheme']})" for s in made["schemes"]) or "no linear quantized"
    title = ", ".join(dict.fromkeys(f"{s['format']} {s['num_bits']} bits" for s in made["schemes"]))
    parts = [
        f"# {(base or known.name).rpartition('/')[2]}, {title or 'converted'}",
        "",
        f"A quantized version of {of}: {kinds}; {sizes} ({_ratio(made)}).",
    ]
    bits = list(_bits(made))
    return "\n".join([*parts, *(["", "Bits per weight: " + ", ".join(bits) + "."] if bits else [])])


def _ratio(made: Mapping[str, Any]) -> str:
    return f"{made['output']['bytes'] / max(1, made['source']['bytes']):.0%}"


def _bits(made: Mapping[str, Any]) -> Iterator[str]:
    output, source = made["output"], made["source"]
    if output.get("quantized_parameters"):
        each = 8 * output["quantized_bytes"] / output["quantized_parameters"]
        yield f"{each:.2f} in the quantized linears (scales counted)"
    if source.get("parameters"):
        yield f"{8 * output['bytes'] / source['parameters']:.2f} over all parameters"


def _quantized(known: Known) -> Iterator[str]:
    made = known.made
    if made is None:
        return
    total = sum(s["linears"] for s in made["schemes"])
    yield f"{total} of {made['linears']} linears (routers and MTP head not counted)."
    yield ""
    yield from markdown_table(
        ("layout", "scheme", "codes", "linears"),
        ([f"`{s['format']}`", s["scheme"], METHODS.get(s["method"], s["method"]), str(s["linears"])] for s in made["schemes"]),
    )
    yield ""
    yield from markdown_table(("quantized", "modules"), ([f"`{n}`", str(c)] for n, c in made["quantized"].items()))
    yield ""
    yield from markdown_table(
        ("kept as it was", "modules", "why"),
        ([f"`{n}`", str(c), made["why_unquantized"].get(n, "")] for n, c in made["unquantized"].items()),
    )
    if made["dropped"]:
        yield ""
        yield "Dropped: " + ", ".join(f"`{name}` x {count}" for name, count in made["dropped"].items()) + "."


def _how(known: Known) -> Iterator[str]:
    if known.made is not None and known.made["command"]:
        yield f"With [tensorsurgeon](https://pypi.org/project/tensorsurgeon/) {known.made['tensorsurgeon']}:"
        yield ""
        yield "```bash"
        yield shlex.join(known.made["command"])
        yield "```"
        yield ""
    commit = known.record["source"].get("hub", {}).get("commit") if known.record and "source" in known.record else None
    if commit:
        yield f"The original was read at commit `{commit}`."
        yield ""
    calibration = (known.record or {}).get("calibration")
    if not calibration:
        yield from _rounded(known)
        return
    options = calibration.get("options", {})
    if "tokens" in calibration:
        sequences, length = calibration["tokens"]
        yield f"Calibrated on {sequences} sequences of {length} tokens, drawn with seed {options.get('seed')}, from:"
        yield ""
        for source in calibration.get("sources", []):
            yield f"- {source['name']} ({source['kind']}, {source['samples']} sequences, digest `{source['digest']}`)"
        yield ""
    said = {"experts": "experts fed", "expert_hessian": "Hessians of experts", "sequential": "sequential"}
    yield "; ".join(f"{words}: {options[key]}" for key, words in said.items() if key in options) + "."
    methods = (known.log or {}).get("methods", {})
    if methods:
        yield ""
        counted = ", ".join(f"{count} {name}" for name, count in sorted(methods.items()))
        yield f"Codes of linears were chosen by: {counted}; `quant_log.csv` has the loss of each."


def _rounded(known: Known) -> Iterator[str]:
    made = known.made
    if made is None or not made["schemes"]:
        return
    yield "Codes are rounded to nearest (RTN); no calibration data was used."
    for name in dict.fromkeys(NAMED_AS_ALGORITHMS[s["format"]] for s in made["schemes"] if s["format"] in NAMED_AS_ALGORITHMS):
        yield f"{name} is the name of the layout on disk here, and not of what chose the codes."


def _evidence(known: Known) -> Iterator[str]:
    if known.evaluation is None and known.verification is None:
        yield "Not measured yet."
    if known.evaluation is not None:
        target, source, text = (known.evaluation[key] for key in ("target", "source", "text"))
        names = ", ".join(str(s["name"]) for s in text["sources"])
        yield f"On {text['tokens']} tokens in {text['sequences']} sequences ({names}); inputs {target['inputs']}:"
        yield ""
        yield from markdown_table(("", "original", "this"), _figures(target, source))
        yield ""
    if known.verification is not None:
        found = known.verification
        yield f"`surgeon verify` against the original: {'sound' if found['sound'] else str(len(found['faults'])) + ' faults'}" + (
            f", {found['equal_bytes']} bytes equal." if found.get("equal_bytes") is not None else "."
        )
        yield ""
        rows = ([f"`{k['pattern']}`", str(k["count"]), _db(k["min_db"]), _db(k["mean_db"])] for k in found["kinds"])
        yield from markdown_table(("weights", "count", "least signal to noise", "mean"), rows)


def _db(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f} dB"


def _figures(target: Mapping[str, Any], source: Mapping[str, Any] | None) -> Iterator[list[str]]:
    other = source or {}
    yield ["perplexity", f"{other['perplexity']:.4f}" if other else "", f"{target['perplexity']:.4f}"]
    if "kl" not in target:
        return
    quantiles = target["kl_quantiles"]
    yield ["KL(original, this), nats per token", "", with_error(target["kl"], target["kl_se"])]
    yield ["its 50, 95, 99 % and maximum", "", ", ".join(f"{quantiles[key]:.4g}" for key in ("p50", "p95", "p99", "max"))]
    yield ["KL(this, original)", "", with_error(target["reverse_kl"], target["reverse_kl_se"])]
    yield ["same most likely token", "", f"{target['top1_agreement']:.2%}"]
    yield ["relative error of the last hidden state", "", f"{target['hidden_error'][-1]:.4f}"]


def with_error(value: float, error: float | None) -> str:
    """A figure with its standard error, where there is one."""
    return f"{value:.5f}" if error is None else f"{value:.5f} ± {error:.5f}"


def serve_line(made: Mapping[str, Any], name: str) -> str | None:
    """The ``vllm serve`` that fits; None where vLLM does not load the checkpoint."""
    vllm = next((engine for engine in made["engines"] if engine["engine"] == "vllm"), None)
    if vllm is None or not vllm["loads_at_tp"]:
        return None
    tp = min(vllm["loads_at_tp"])
    return f"vllm serve {name}" + (f" --tensor-parallel-size {tp}" if tp > 1 else "")


def _serving(known: Known) -> Iterator[str]:
    made = known.made
    if made is None:
        return
    line = serve_line(made, known.name)
    if line is not None:
        yield "```bash"
        yield line
        yield "```"
        yield ""
    yield "By rules that were tested or read in the engines' source; nothing was loaded for this table."
    yield ""
    yield from markdown_table(("engine", "verdict", "why"), map(list, engine_rows(made)))


def engine_rows(made: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """For each engine its version, a verdict in words, and what stands against it, the worst first."""
    for engine in made["engines"]:
        advice = engine["advice"]
        worst = [a for severity in ("silent-garbage", "refuses", "warns") for a in advice if a["severity"] == severity]
        sizes = engine["loads_at_tp"]
        if any(a["severity"] == "silent-garbage" for a in advice):
            verdict = "**loads and answers nonsense**" + (f", but for tensor parallel {_listed(sizes)}" if sizes else "")
        elif sizes:
            verdict = "loads" + ("" if engine["asked_tp"] == [1] else f" at tensor parallel {_listed(sizes)}")
        else:
            verdict = "refuses" if worst else "not judged"
        reasons = dict.fromkeys(
            f"{a['subject']}: {a['reason']}" for a in worst if not sizes or a["tp"] == min(sizes) or a in worst[:1]
        )
        yield f"{engine['engine']} {engine['version']}", verdict, "; ".join(list(reasons)[:2])


def _listed(sizes: Iterable[int]) -> str:
    return ", ".join(map(str, sizes))


def _limits(known: Known) -> Iterator[str]:
    made = known.made
    if known.evaluation is None:
        yield "- Its predictions were not compared with the original's: `surgeon evaluate` does that."
    elif "kl" in known.evaluation["target"]:
        yield "- The comparison is of text alone, teacher-forced: no task was run, no image was seen."
    if made is None:
        return
    if {s["method"] for s in made["schemes"]} == {"rtn"} and any(s["num_bits"] < 8 for s in made["schemes"]):
        yield "- Below 8 bits, rounding to nearest loses more than codes chosen by calibration do."
    for engine, verdict, why in engine_rows(made):
        if not verdict.startswith("loads"):
            yield f"- {engine}: {verdict}{': ' + why if why else ''}."
    yield "- The cache of keys and values is not quantized by this checkpoint."


def _hashes(known: Known) -> Iterator[str]:
    if known.record is None:
        return
    yield "`surgeon.json` has a digest of every range of weights and of every file; `surgeon verify FOLDER` compares them."
    yield ""
    if known.digest is not None:
        yield f"- weights: `{known.digest}` (SHA-256 of the digests of all byte ranges)"
    yield f"- run: `{known.record.get('fingerprint')}` (source, recipe and layout)"
    yield ""
    yield f"This part of the card was written by tensorsurgeon {__version__}."


def markdown_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """A table as GitHub and the Hub read it; a bar in a cell is escaped."""
    columns = list(head)
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
