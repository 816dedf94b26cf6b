"""The charts of a page, as Vega-Lite: what is large, where the error is, what calibration saw. Colours of text are the page's."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from tensorsurgeon.calibrate.log import LogRow
from tensorsurgeon.errors import RecipeError
from tensorsurgeon.planning.report import grouped_name

_LAYER: Final = re.compile(r"\.(?:layers|blocks|h)\.(\d+)\.")
_WIDTH: Final = 620
_UNITS: Final = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3), ("bytes", 1))
Spec = dict[str, Any]


class Chart(NamedTuple):
    """A chart with its title, and a sentence that says how to read it."""

    title: str
    caption: str
    spec: Spec


def _altair() -> Any:
    try:
        import altair
    except ImportError as error:
        raise RecipeError("pages are drawn with altair: pip install 'tensorsurgeon[page]'") from error
    return altair


def sizes(before: Mapping[str, int], after: Mapping[str, int]) -> Chart:
    """Bytes of each part of the model, in the original and here."""
    alt = _altair()
    # In the unit that the largest part is told in.
    unit, factor = next((u, f) for u, f in _UNITS if max([*before.values(), *after.values()], default=0) >= f or f == 1)
    rows = [
        {"part": part, "which": which, "size": nbytes / factor}
        for which, parts in (("original", before), ("this", after))
        for part, nbytes in parts.items()
    ]
    chart = (
        alt.Chart(alt.Data(values=rows), width=_WIDTH)
        .mark_bar()
        .encode(
            x=alt.X("size:Q", title=unit),
            y=alt.Y("part:N", sort=list(before), title=None),
            yOffset=alt.YOffset("which:N"),
            color=alt.Color("which:N", title=None, scale=alt.Scale(domain=["original", "this"], range=["#9aa5b1", "#2f7ed8"])),
            tooltip=["part:N", "which:N", alt.Tooltip("size:Q", format=".3f", title=unit)],
        )
        .properties(height=alt.Step(14))
    )
    return Chart("Size by part", "What each part of the model takes on disk, in the original and here.", chart.to_dict())


def place_of(name: str) -> tuple[int, str] | None:
    """Layer and kind of a weight; None for one that lies in no layer."""
    found = _LAYER.search(name)
    if found is None:
        return None
    return int(found[1]), grouped_name(f".{name[found.end() :]}").lstrip(".").removesuffix(".weight")


def errors(weights: Iterable[Mapping[str, Any]]) -> Chart | None:
    """Signal to noise of weights against the original, by layer and kind; None where nothing differs."""
    groups: dict[tuple[int, str], list[float]] = defaultdict(list)
    for weight in weights:
        place = place_of(str(weight["name"]))
        if place is not None and weight["snr_db"] is not None:
            groups[place].append(float(weight["snr_db"]))
    if not groups:
        return None
    rows = [
        {"layer": layer, "kind": kind, "mean": sum(values) / len(values), "least": min(values), "most": max(values)}
        for (layer, kind), values in sorted(groups.items())
    ]
    alt = _altair()
    axis = alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True))
    base = alt.Chart(alt.Data(values=rows), width=_WIDTH, height=320)
    color = alt.Color("kind:N", title=None, scale=alt.Scale(scheme="tableau20"), legend=alt.Legend(labelLimit=320, columns=1))
    tips = ["layer:O", "kind:N", *(alt.Tooltip(f"{key}:Q", format=".2f") for key in ("mean", "least", "most"))]
    dots = base.mark_point(filled=True, size=45, opacity=0.9).encode(
        x=axis, y=alt.Y("mean:Q", title="signal to noise, dB", scale=alt.Scale(zero=False)), color=color, tooltip=tips
    )
    ranges = base.mark_rule(opacity=0.5).encode(x=axis, y="least:Q", y2="most:Q", color=color)
    return Chart(
        "Error of weights",
        "Signal to noise of dequantized weights against the original's: a point is the mean of a kind in a layer, its line "
        "reaches from the worst to the best. Six dB are one bit.",
        (ranges + dots).to_dict(),
    )


def losses(log: Sequence[LogRow]) -> Chart | None:
    """Relative loss of what calibration chose, by layer and kind; None where nothing was measured."""
    groups: dict[tuple[int, str], list[float]] = defaultdict(list)
    for row in log:
        place = place_of(f"{row.module}.weight")
        if place is not None and row.relative_loss is not None:
            groups[place].append(row.relative_loss)
    if not groups:
        return None
    alt = _altair()
    rows = [{"layer": layer, "kind": kind, "loss": sum(v) / len(v)} for (layer, kind), v in sorted(groups.items())]
    chart = (
        alt.Chart(alt.Data(values=rows), width=_WIDTH, height=320)
        .mark_line(point=True)
        .encode(
            x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("loss:Q", title="relative loss"),
            color=alt.Color(
                "kind:N", title=None, scale=alt.Scale(scheme="tableau20"), legend=alt.Legend(labelLimit=320, columns=1)
            ),
            tooltip=["layer:O", "kind:N", alt.Tooltip("loss:Q", format=".5f")],
        )
    )
    return Chart(
        "Loss in calibration",
        "What quantizing adds to a linear's outputs on the calibration tokens, relative to them; the mean of a kind in a layer.",
        chart.to_dict(),
    )


def experts(log: Sequence[LogRow]) -> list[Chart]:
    """Loss and tokens of each expert of each layer; none where there are no experts."""
    cells: dict[tuple[int, int], list[LogRow]] = defaultdict(list)
    for row in log:
        if row.layer is not None and row.expert is not None:
            cells[row.layer, row.expert].append(row)
    if not cells:
        return []
    rows = []
    for (layer, expert), members in sorted(cells.items()):
        lost = [m.relative_loss for m in members if m.relative_loss is not None]
        tokens = min(m.tokens for m in members)
        rows.append({"layer": layer, "expert": expert, "tokens": tokens, "loss": sum(lost) / len(lost) if lost else None})
    made = [
        _heat(
            rows, "tokens", "Tokens by expert", "Calibration tokens that each expert was fed; the darkest saw the fewest.", ",.0f"
        )
    ]
    if any(row["loss"] is not None for row in rows):
        caption = "Relative loss of each expert, the mean of its linears; empty where it was rounded to nearest."
        made.append(_heat(rows, "loss", "Loss by expert", caption, ".5f"))
    return made


def _heat(rows: list[dict[str, Any]], key: str, title: str, caption: str, form: str) -> Chart:
    alt = _altair()
    count = 1 + max(row["expert"] for row in rows)
    chart = (
        alt.Chart(alt.Data(values=rows), width=_WIDTH, height=alt.Step(14))
        .mark_rect()
        .encode(
            x=alt.X("expert:O", title="expert", axis=alt.Axis(labelOverlap=True, labelAngle=0, ticks=count < 40)),
            y=alt.Y("layer:O", title="layer", axis=alt.Axis(labelOverlap=True)),
            color=alt.Color(f"{key}:Q", title=key, scale=alt.Scale(scheme="viridis", zero=False)),
            tooltip=["layer:O", "expert:O", alt.Tooltip(f"{key}:Q", format=form)],
        )
    )
    return Chart(title, caption, chart.to_dict())


def hidden(errors_by_layer: Sequence[float]) -> Chart:
    """Relative error of the states between layers."""
    alt = _altair()
    rows = [{"after": "in" if k == 0 else str(k - 1), "error": error} for k, error in enumerate(errors_by_layer)]
    chart = (
        alt.Chart(alt.Data(values=rows), width=_WIDTH, height=220)
        .mark_area(line=True, point=True, opacity=0.25, color="#2f7ed8")
        .encode(
            x=alt.X("after:O", sort=None, title="after layer", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("error:Q", title="relative error"),
            tooltip=["after:O", alt.Tooltip("error:Q", format=".5f")],
        )
    )
    caption = (
        "How far hidden states are from the original's on the evaluation text, before the layers and after each: where it breaks."
    )
    return Chart("Error of hidden states", caption, chart.to_dict())


def divergence(target: Mapping[str, Any]) -> Chart:
    """Mean and quantiles of KL over tokens, on a logarithmic scale."""
    alt = _altair()
    rows = [
        {"what": what, "direction": name, "kl": max(float(value), 1e-8)}
        for name, prefix in (("original ‖ this", ""), ("this ‖ original", "reverse_"))
        for what, value in (
            ("mean", target[f"{prefix}kl"]),
            *((f"{key[1:]} %", target[f"{prefix}kl_quantiles"][key]) for key in ("p50", "p95", "p99")),
            ("max", target[f"{prefix}kl_quantiles"]["max"]),
        )
    ]
    chart = (
        alt.Chart(alt.Data(values=rows), width=_WIDTH, height=200)
        .mark_point(filled=True, size=90)
        .encode(
            x=alt.X("kl:Q", scale=alt.Scale(type="log"), title="nats per token"),
            y=alt.Y("what:N", sort=None, title=None),
            yOffset=alt.YOffset("direction:N"),
            color=alt.Color("direction:N", title=None, scale=alt.Scale(range=["#2f7ed8", "#e07b39"])),
            shape=alt.Shape("direction:N", title=None),
            tooltip=["what:N", "direction:N", alt.Tooltip("kl:Q", format=".6f")],
        )
    )
    return Chart("KL divergence", "Of the predicted distributions, over the tokens of the evaluation text.", chart.to_dict())
