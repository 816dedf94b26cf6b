"""What each choice of codes leaves of the same bytes: KL to BF16 on held-out text, over several draws of calibration text.

    python benchmarks/bench_quality.py [--grids int4-g32,int4-g128,int3-g128,int2-g32] [--seeds 0,1,2] [--samples 40]
    python benchmarks/bench_quality.py --methods rtn,unsigned,signed --grids int3-g128

Checkpoints are made and scored as in bench_kl.py: compressed-tensors' packed layout, symmetric, scales in BF16, dequantized by
``surgeon apply dequantize`` and loaded by transformers. ``less`` is how much KL a method takes off ``unsigned`` in a sequence,
the mean over seeds first: a share of the mean, with its standard error over sequences. Seconds are CPU seconds of the process.

llm-compressor's oneshot at its best settings is a row where its environment is there (llmcompressor_env.sh makes it); else the
row says "not run". So is AutoRound where ``--autoround`` names an interpreter that has it (``pip install auto-round==0.16.1
torch==2.13.0 transformers``); ``signround-autoround`` is our own walk with its recipe.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_kl import Judge, measure, nll_of, row_of
from their_autoround import autoround_run

from tensorsurgeon.calibrate.data.data import load_data
from tensorsurgeon.calibrate.options import CalibrationOptions, DataSource
from tensorsurgeon.calibrate.walk.model import StreamedModel
from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.ops.quantize import Quantize
from tensorsurgeon.planning.plan import Plan, make_plan
from tensorsurgeon.planning.rewriting import steps_of
from tensorsurgeon.quant.signround.options import RECIPES
from tensorsurgeon.recipes.library import load_transform

_FIXTURES = Path(__file__).parents[1] / "fixtures"
GRIDS = {"int4-g32": (4, 32), "int4-g128": (4, 128), "int3-g128": (3, 128), "int2-g32": (2, 32)}
OTHER_GRIDS = {"int4-g64": (4, 64), "int3-g64": (3, 64)}
# Narrow floats, which have no signed scales: "unsigned" and "asymmetric" are the methods to compare with "rtn".
FLOATS = {
    "nvfp4": {"format": "ct-nvfp4"},
    "mxfp4": {"format": "ct-mxfp4"},
    "fp8-channel": {"format": "ct-float"},
    "fp8-block": {"format": "hf-fp8"},
}
BASE = "unsigned"
PEER = "routed-imatrix"


@dataclass(frozen=True)
class Way:
    """How codes are chosen: the step's method and signs, and what calibration is told beside its data."""

    method: str
    signed: bool
    options: dict[str, Any]


WAYS = {
    "rtn": Way("rtn", False, {}),
    "rtn-signed": Way("rtn", True, {}),
    "unsigned": Way("gptq", False, {"asymmetric": 0.0}),
    "signed": Way("gptq", True, {"asymmetric": 0.0}),
    "asymmetric": Way("gptq", True, {"asymmetric": 0.5}),
    "unsigned-asymmetric": Way("gptq", False, {"asymmetric": 0.5}),
    "asymmetric-1": Way("gptq", True, {"asymmetric": 1.0}),
    "default": Way("gptq", True, {}),
    "signround": Way("signround", True, {}),
    "signround-autoround": Way("signround", True, {"signround": RECIPES["autoround"]}),
}


def plan_for(model: Path, grid: str, way: Way) -> Plan:
    given: dict[str, Any] = {**FLOATS[grid]} if grid in FLOATS else {"format": "ct-packed"}
    if grid not in FLOATS:
        given["num_bits"], given["group_size"] = (GRIDS | OTHER_GRIDS)[grid]
    steps = steps_of(load_transform("quantize-linears", given))
    method: Any = way.method
    signed = None if grid in FLOATS else way.signed
    return make_plan(
        [replace(s, method=method, signed=signed) if isinstance(s, Quantize) else s for s in steps], open_checkpoint(model)
    )


def peer_runs(
    given: argparse.Namespace, judge: Judge, grid: str, options: Callable[[int], CalibrationOptions], work: Path
) -> list[dict[str, Any]]:
    """llm-compressor's oneshot on the same chunks; nothing where its environment is not there."""
    if not given.llmcompressor.exists() or grid in FLOATS:
        return []
    import bench_oneshot

    num_bits, group_size = (GRIDS | OTHER_GRIDS)[grid]
    planned = set(plan_for(given.model, grid, WAYS["unsigned"]).quantized)
    orders = []
    for seed in given.seeds:
        np.save(work / f"{seed}.npy", tokens_of(given, options(seed)))
        orders.append(
            {
                "setting": PEER, "folder": str(work / f"peer-{seed}"), "tokens": str(work / f"{seed}.npy"),
                "model": str(given.model), "num_bits": num_bits, "group_size": group_size,
            }
        )  # fmt: skip
    bench_oneshot.run_oneshot(given.llmcompressor, orders, given.workers, work)
    return [bench_oneshot.score_oneshot(judge, given.model, Path(o["folder"]), planned, False, work) for o in orders]


def tokens_of(given: argparse.Namespace, options: CalibrationOptions) -> np.ndarray:
    """The chunks that ours are calibrated on."""
    return load_data(options, given.model, StreamedModel(open_checkpoint(given.model)).vocabulary_rows).tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=_FIXTURES / "tiny-qwen3_5-moe")
    parser.add_argument("--text", type=Path, default=_FIXTURES / "text" / "heldout.txt")
    parser.add_argument("--calibration", default=str(_FIXTURES / "text" / "calibration.txt"))
    parser.add_argument("--grids", default=",".join(GRIDS))
    parser.add_argument("--methods", default="rtn,rtn-signed,unsigned,signed,asymmetric")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=24, help="held-out sequences of 250 tokens")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--llmcompressor", type=Path, default=Path(__file__).parents[1] / ".venvs/llmcompressor/bin/python")
    parser.add_argument("--autoround", type=Path, help="an interpreter that has auto-round 0.16.1: also run that")
    parser.add_argument("--autoround-steps", type=lambda text: [int(n) for n in text.split(",")], default=[200])
    parser.add_argument("--json", type=Path, help="also write the table here")
    given = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    judge = Judge(given.model, given.text, given.sequences)
    reference_nll = nll_of(judge)

    def options(seed: int, **more: Any) -> CalibrationOptions:
        return CalibrationOptions(
            sources=(DataSource(given.calibration),), samples=given.samples, sequence_length=given.length, seed=seed, **more
        )

    table = []
    print(f"| grid | method | KL | by seed | less | NLL change | CPU s |\n|{'---|' * 7}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for grid in given.grids.split(","):
            runs: dict[str, list[dict[str, Any]]] = {}
            for name in given.methods.split(","):
                way = WAYS[name]
                plan = plan_for(given.model, grid, way)
                seeds = [None] if way.method == "rtn" else given.seeds
                runs[name] = [
                    measure(
                        judge,
                        plan,
                        None if seed is None else options(seed, **way.options),
                        Path(folder),
                        given.workers,
                        clock=time.process_time,
                    )
                    for seed in seeds
                ]
                table.append(_row(grid, name, runs, reference_nll))
            peer = f"llm-compressor, {PEER}"
            runs[peer] = peer_runs(given, judge, grid, options, Path(folder))
            if runs[peer]:
                table.append(_row(grid, peer, runs, reference_nll))
            else:
                print(f"| {grid} | {peer} | not run | | | | |", flush=True)
            for steps in given.autoround_steps if given.autoround is not None else []:
                peer = f"AutoRound, {steps} iterations"
                runs[peer] = [
                    autoround_run(
                        given.autoround,
                        judge,
                        given.model,
                        tokens_of(given, options(seed)),
                        (GRIDS | OTHER_GRIDS)[grid],
                        steps,
                        Path(folder),
                    )
                    for seed in given.seeds
                ]
                table.append(_row(grid, peer, runs, reference_nll))
    perplexity = math.exp(float(reference_nll.mean()))
    print(f"\nBF16 perplexity {perplexity:.3f} on {judge.ids.numel()} held-out tokens; n = {given.samples}")
    if given.json:
        given.json.write_text(json.dumps(table, indent=1))


def _row(grid: str, name: str, runs: dict[str, list[dict[str, Any]]], reference_nll: np.ndarray) -> dict[str, Any]:
    """The row of one method, printed."""
    row = row_of(grid, name, "", runs[name], reference_nll)
    by_seed = " / ".join(f"{run['kl'].mean():.5f}" for run in runs[name])
    less = ""
    if BASE in runs and name != BASE:
        mine, base = (np.stack([run["kl"] for run in runs[n]]).mean(0) for n in (name, BASE))
        change = (base - mine) / base.mean()
        row["less"], row["less_se"] = float(change.mean()), float(change.std(ddof=1) / math.sqrt(len(change)))
        less = f"{row['less']:.1%} ± {row['less_se']:.1%}"
    print(
        f"| {grid} | {name} | {row['kl']:.5f} ± {row['kl_se']:.5f} | {by_seed} | {less} | "
        f"{row['nll_change']:+.4f} ± {row['nll_se']:.4f} | {row['seconds']:.0f} |", flush=True,
    )  # fmt: skip
    return row


if __name__ == "__main__":
    main()
