"""``surgeon card`` and ``surgeon page``: what is published beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tensorsurgeon.cli.terminal import Place, emit, json_option, note

_against = click.option(
    "--against", type=Place(), metavar="SOURCE",
    help="Verify against the original first, and keep what was found in verification.json.",
)  # fmt: skip
_workers = click.option("--workers", type=click.IntRange(1, 256), help="Threads to verify with; the cores by default.")


def _verify(folder: Path, against: str | None, workers: int | None) -> None:
    if against is None:
        return
    from tensorsurgeon.publish.verified import verify_and_keep

    found = verify_and_keep(folder, against, workers=workers)
    if not found.is_sound:
        note(f"note: {len(found.faults)} faults; surgeon verify {folder} --against {against} names them")


@click.command(short_help="Write or refresh the model card (README.md).")
@click.argument("target", type=Place())
@click.option("--base-model", metavar="OWNER/NAME", help="The original on the Hub, where the folder's name does not tell.")
@click.option("--name", metavar="OWNER/NAME", help="What this checkpoint will be called there, for the lines that serve it.")
@_against
@_workers
@json_option
def card(target: str, base_model: str | None, name: str | None, against: str | None, workers: int | None, as_json: bool) -> None:
    """Write the README.md of TARGET, or its generated part anew: what was quantized and how, figures, engines, limits.

    What a person wrote above or below the generated part stays, and so do keys of the front matter.

    \b
    surgeon card Qwen3.6-35B-A3B-INT8 --base-model Qwen/Qwen3.6-35B-A3B --against Qwen3.6-35B-A3B
    """
    from tensorsurgeon.publish.card import base_model_of, known_of, write_card
    from tensorsurgeon.publish.verified import checkpoint_folder

    folder = checkpoint_folder(target)
    _verify(folder, against, workers)
    path = write_card(folder, base_model=base_model, name=name)
    known = known_of(folder)
    missing = [
        text
        for text, found in (
            ("how it was made (surgeon_plan.json)", known.made),
            ("an evaluation: surgeon evaluate TARGET --against SOURCE --text FILE", known.evaluation),
            ("the original's name on the Hub: surgeon card TARGET --base-model OWNER/NAME", base_model_of(path)),
            ("a verification: surgeon card TARGET --against SOURCE", known.verification),
        )
        if found is None
    ]
    data: dict[str, Any] = {"card": str(path), "missing": missing}
    emit(data, "\n".join([f"written to {path}", *(f"note    it lacks {text}" for text in missing)]), as_json)


@click.command(short_help="Draw one HTML page of what was done and lost.")
@click.argument("target", type=Place())
@click.option("--out", type=Place(), metavar="FILE", help="Where to write it.  [default: surgeon.html in TARGET]")
@_against
@_workers
@json_option
def page(target: str, out: str | None, against: str | None, workers: int | None, as_json: bool) -> None:
    """Draw TARGET as one HTML file that needs no network: sizes, errors, losses, experts, engines, steps.

    What evaluate, card --against and calibration left beside it is drawn; the more there is, the more there is to see.

    \b
    surgeon page Qwen3.6-35B-A3B-INT8 --against Qwen3.6-35B-A3B
    """
    from tensorsurgeon.publish.page import write_page
    from tensorsurgeon.publish.verified import checkpoint_folder

    folder = checkpoint_folder(target)
    _verify(folder, against, workers)
    path = write_page(folder, None if out is None else Path(out))
    emit({"page": str(path)}, str(path), as_json)
