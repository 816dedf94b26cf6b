"""``surgeon evaluate``: how far a quantized model is from the original, without loading either."""

from __future__ import annotations

import click

from tensorsurgeon.cli import completing
from tensorsurgeon.cli.calibrate import noting
from tensorsurgeon.cli.terminal import Place, at_home, emit, json_option, note, step_bar, stop_on_signals
from tensorsurgeon.evaluating.options import SAMPLES, SEQUENCE_LENGTH, TextOptions


@click.command(short_help="Measure KL and perplexity, layer by layer.")
@click.argument("targets", nargs=-1, required=True, type=Place(), metavar="TARGET...")
@click.option(
    "--against", type=Place(), metavar="SOURCE", help="The checkpoint TARGET was made from; without it, perplexity alone."
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    callback=at_home,
    shell_complete=completing.texts,
    required=True,
    metavar="FILE",
    help="What to predict: text, JSON lines, Parquet, or lists of token ids, each a sequence of its own.",
)
@click.option("--samples", type=click.IntRange(1), default=SAMPLES, show_default=True, help="Sequences of text.")
@click.option("--sequence-length", type=click.IntRange(2), default=SEQUENCE_LENGTH, show_default=True, help="Tokens in each.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Which are drawn.")
@click.option("--float-inputs", is_flag=True, help="Weights alone: leave inputs as they are where the config quantizes them.")
@click.option("--no-file", is_flag=True, help="Write no evaluation.json beside the targets.")
@click.option("--workers", type=click.IntRange(1, 256), help="Threads; the cores of this machine by default.")
@click.option("--device", metavar="NAME", default="cpu", show_default=True, help="Where to compute: cpu, or cuda for a GPU.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bar and no messages.")
@json_option
def evaluate(
    targets: tuple[str, ...],
    against: str | None,
    texts: tuple[str, ...],
    samples: int,
    sequence_length: int,
    seed: int,
    float_inputs: bool,
    no_file: bool,
    workers: int | None,
    device: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Say how far the predictions of each TARGET are from those of the SOURCE it was made from.

    Both walk the same text, one layer of each in memory: weights as a reader computes them, inputs quantized where the
    config says so. A run that was stopped goes on when it is started again.

    \b
    surgeon evaluate Qwen3.6-35B-A3B-INT8 --against Qwen3.6-35B-A3B --text heldout.txt
    surgeon evaluate INT4 INT8 FP8 --against Qwen3.6-35B-A3B --text heldout.txt --samples 128
    """
    from tensorsurgeon.evaluating.result import evaluation_as_data, evaluation_as_text, write_evaluations
    from tensorsurgeon.evaluating.run import evaluate as run

    options = TextOptions(locations=texts, samples=samples, sequence_length=sequence_length, seed=seed)
    with (
        stop_on_signals("before the next batch") as stop,
        step_bar(quiet) as (advance, say),
        noting(None if quiet else say, "tensorsurgeon.evaluating"),
    ):
        found = run(
            targets, options, against=against, float_inputs=float_inputs, workers=workers, device=device, stop=stop,
            progress=lambda step: advance(step.done, step.total, step.what),
        )  # fmt: skip
    if not no_file:
        for path in write_evaluations(found):
            if not quiet:
                note(f"written to {path}")
    emit(evaluation_as_data(found) if as_json else None, "" if as_json else evaluation_as_text(found), as_json)
