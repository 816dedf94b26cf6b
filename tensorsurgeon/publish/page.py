"""The page: one HTML file with all that it needs in it, readable without a network, in light, in dark and on paper."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Final

from tensorsurgeon.calibrate.log import LOG_NAME, LogRow, read_log
from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.checkpoint.sink import publish_bytes
from tensorsurgeon.checkpoint.telling import PAGE
from tensorsurgeon.errors import RecipeError
from tensorsurgeon.publish import charts
from tensorsurgeon.publish.card import known_of
from tensorsurgeon.publish.card_text import METHODS, Known, engine_rows, with_error
from tensorsurgeon.publish.made import bytes_by_part
from tensorsurgeon.running.record import add_files
from tensorsurgeon.tensors.sizes import show_size
from tensorsurgeon.version import __version__

_WORST: Final = 15


def write_page(folder: Path, path: Path | None = None) -> Path:
    """Write the page of a checkpoint, in its folder unless ``path`` says where; RecipeError without the plotting library."""
    content = page_of(folder).encode()
    publish_bytes(path or folder / PAGE, content)
    if path is None or path.resolve() == (folder / PAGE).resolve():
        add_files(folder, {PAGE: content})
    return path or folder / PAGE


def page_of(folder: Path) -> str:
    """The page's text."""
    known = known_of(folder)
    log = read_log(folder / LOG_NAME) if (folder / LOG_NAME).is_file() else []
    title = folder.resolve().name
    drawn = list(_charts(folder, known, log))
    sections = [_head(title, known), *(_chart(k, chart) for k, chart in enumerate(drawn)), *_tables(known, log)]
    template = Template((files("tensorsurgeon.publish") / "page.html").read_text())
    specs = json.dumps([chart.spec for chart in drawn]).replace("</", "<\\/")
    return template.substitute(title=escape(title), body="\n".join(sections), library=_library(), charts=specs)


def _library() -> str:
    """Vega, Vega-Lite and its embedding, as one script that asks nobody for anything."""
    try:
        import altair
        import vl_convert
    except ImportError as error:
        raise RecipeError(
            "pages carry Vega-Lite in them, from altair and vl-convert: pip install 'tensorsurgeon[page]'"
        ) from error
    version = ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version)
    return bundle.replace("</script", "<\\/script")


def _charts(folder: Path, known: Known, log: Sequence[LogRow]) -> Iterator[charts.Chart]:
    after = known.made["output"]["parts"] if known.made else bytes_by_part(open_checkpoint(folder, tolerant=True).specs)
    yield charts.sizes(known.made["source"]["parts"] if known.made else {}, after)
    if known.evaluation is not None and "kl" in known.evaluation["target"]:
        yield charts.divergence(known.evaluation["target"])
        yield charts.hidden(known.evaluation["target"]["hidden_error"])
    if known.verification is not None and (chart := charts.errors(known.verification["weights"])) is not None:
        yield chart
    if (chart := charts.losses(log)) is not None:
        yield chart
    yield from charts.experts(log)


def _chart(number: int, chart: charts.Chart) -> str:
    words = f"<h2>{escape(chart.title)}</h2><p>{escape(chart.caption)}</p>"
    return f'<section>{words}<div class="chart" id="chart-{number}"></div></section>'


def _head(title: str, known: Known) -> str:
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for what, value in _figures(known)
    )
    made = known.made
    command = f"<pre>{escape(shlex.join(made['command']))}</pre>" if made and made["command"] else ""
    of = f"Made from {escape(str(made['source']['name']))} with tensorsurgeon {escape(made['tensorsurgeon'])}." if made else ""
    return f'<h1>{escape(title)}</h1><p>{of}</p><div class="tiles">{tiles}</div>{command}'


def _figures(known: Known) -> Iterator[tuple[str, str]]:
    made = known.made
    if made is not None:
        yield f"of {show_size(made['source']['bytes'])}", show_size(made["output"]["bytes"])
        yield f"of {made['linears']} linears quantized", str(sum(s["linears"] for s in made["schemes"]))
        if made["output"].get("quantized_parameters"):
            yield (
                "bits per quantized weight",
                f"{8 * made['output']['quantized_bytes'] / made['output']['quantized_parameters']:.2f}",
            )
    if known.evaluation is not None:
        target, source = known.evaluation["target"], known.evaluation["source"]
        if "kl" in target:
            yield "KL from the original, nats per token", with_error(target["kl"], target["kl_se"])
            yield "same most likely token", f"{target['top1_agreement']:.2%}"
        yield "perplexity" + (f", original {source['perplexity']:.3f}" if source else ""), f"{target['perplexity']:.3f}"
    if known.verification is not None:
        yield "surgeon verify", "sound" if known.verification["sound"] else f"{len(known.verification['faults'])} faults"


def _tables(known: Known, log: Sequence[LogRow]) -> Iterator[str]:
    made = known.made
    measured = sorted((r for r in log if r.relative_loss is not None), key=lambda r: (-(r.relative_loss or 0), r.module))[:_WORST]
    if measured:
        rows = [[_code(r.module), r.method, f"{r.relative_loss:.5f}", str(r.tokens)] for r in measured]
        yield _table("Worst modules by loss", ("module", "codes", "relative loss", "tokens"), rows, numbers=2)
    cold = [row for row in log if row.method == "rtn"]
    if log:
        rows = [[_code(r.module), escape(r.note), str(r.tokens)] for r in cold[: 2 * _WORST]]
        more = f" The first {len(rows)} of {len(cold)}." if len(cold) > len(rows) else ""
        text = (
            "Modules that calibration could not reach, cold experts among them."
            if cold
            else "None: calibration reached every module."
        )
        yield _table("Rounded to nearest all the same", ("module", "why", "tokens"), rows, numbers=1, text=text + more)
    if known.verification is not None and known.verification["worst"]:
        rows = [[_code(w["name"]), f"{w['snr_db']:.2f}", str(w["num_bits"])] for w in known.verification["worst"]]
        yield _table("Worst weights by error", ("weight", "signal to noise, dB", "bits"), rows, numbers=2)
    if made is not None:
        rows = [
            [escape(s["format"]), escape(s["scheme"]), escape(METHODS.get(s["method"], s["method"])), str(s["linears"])]
            for s in made["schemes"]
        ]
        yield _table("Layouts", ("layout", "scheme", "codes", "linears"), rows, numbers=1)
        yield _table(
            "Engines", ("engine", "verdict", "why"), [[escape(a), _verdict(b), escape(c)] for a, b, c in engine_rows(made)],
            text="By rules that were tested or read in the engines' source; nothing was loaded for this table.",
        )  # fmt: skip
        steps = [[escape(s["op"]), str(s["read"]), str(s["made"]), _code(s["recipe"])] for s in made["steps"]]
        yield _table("Steps of the plan", ("step", "tensors read", "made", "as it was told"), steps)
        kept = [[_code(n), str(c), escape(made["why_unquantized"].get(n, ""))] for n, c in made["unquantized"].items()]
        yield _table("Kept as it was", ("linears", "count", "why"), kept)
    yield f"<footer>Written by tensorsurgeon {__version__}; drawn by Vega-Lite.</footer>"


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _verdict(text: str) -> str:
    return f'<span class="loud">{escape(text.replace("**", ""))}</span>' if text.startswith("**") else escape(text)


def _table(title: str, head: Iterable[str], rows: Iterable[Sequence[str]], *, numbers: int = 0, text: str = "") -> str:
    """A table whose last ``numbers`` columns are numbers; cells are HTML already."""
    heads = list(head)
    plain = len(heads) - numbers
    cells = "".join(
        "<tr>" + "".join(f'<td class="number">{c}</td>' if k >= plain else f"<td>{c}</td>" for k, c in enumerate(row)) + "</tr>"
        for row in rows
    )
    said = f"<p>{escape(text)}</p>" if text else ""
    columns = "".join(f"<th{' class=number' if k >= plain else ''}>{escape(column)}</th>" for k, column in enumerate(heads))
    return (
        f"<section><h2>{escape(title)}</h2>{said}" + (f"<table><tr>{columns}</tr>{cells}</table>" if cells else "") + "</section>"
    )
