"""What feeding cold experts is worth: their error on held-out text, by how they were fed during calibration.

    python benchmarks/bench_experts.py [--samples 1,2,4,16] [--modes routed,balanced,all] [--seeds 0,1,2] [--grid int4-g128]

An expert is cold if the router sends it fewer than --cold calibration tokens. Error is tr(D H D^T) / tr(W H W^T) with H
from held-out tokens that the router sends to that expert in the original model, so it asks what counts: the expert's own
tokens, not those it was topped up with. Layers are calibrated on the original model's states (no --sequential), so that
modes differ in nothing else.
"""

from __future__ import annotations

import argparse
import logging
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_kl import plan_for
from safetensors.torch import load_file

from tensorsurgeon.calibrate.log import LOG_NAME, read_log
from tensorsurgeon.calibrate.options import CalibrationOptions, DataSource
from tensorsurgeon.calibrate.run import run_calibrated
from tensorsurgeon.calibrate.walk.statistics import StoredStatistics, layer_path
from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.planning.plan import make_plan
from tensorsurgeon.planning.rewriting import steps_of
from tensorsurgeon.recipes.library import load_transform
from tensorsurgeon.running.run import run_plan

_FIXTURES = Path(__file__).parents[1] / "fixtures"
_EXPERT = re.compile(r"(.*\.layers\.(\d+)\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def rewritten(transform: str, parameters: dict[str, Any], source: Path, target: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint after a built-in transform."""
    run_plan(make_plan(steps_of(load_transform(transform, parameters)), open_checkpoint(source)), target)
    tensors = tensors_of(target)
    shutil.rmtree(target)
    return tensors


class Judge:
    """Held-out Hessians of every expert, and the original weights."""

    def __init__(self, model: Path, text: Path, grid: str, work: Path) -> None:
        options = CalibrationOptions(
            sources=(DataSource(str(text)),), samples=10_000, sequence_length=250, experts="routed", expert_hessian="own",
            sequential=False, write_statistics=work / "heldout",
        )  # fmt: skip
        run_calibrated(plan_for(model, grid, "gptq"), work / "out", options)
        shutil.rmtree(work / "out")
        self._folder = work / "heldout"
        exclude = {"exclude": ["maybe:mtp.{rest*}"]}
        self.original = rewritten("split-experts", exclude, model, work / "split")
        self.modules = [name.removesuffix(".weight") for name in self.original if _EXPERT.match(name)]

    def errors(self, weights: dict[str, torch.Tensor]) -> dict[str, float]:
        found = {}
        for module in self.modules:
            stack, layer, expert, part = _EXPERT.match(module).groups()  # type: ignore[union-attr]
            key = f"{stack}.{'down_proj' if part == 'down' else 'gate_up_proj'}.{expert}"
            statistics = StoredStatistics(layer_path(self._folder, int(layer))).of(key)
            if statistics is None or statistics.tokens < 64:
                continue
            original = self.original[f"{module}.weight"].double()
            change = original - weights[f"{module}.weight"].double()
            hessian = statistics.hessian.double()  # type: ignore[union-attr]
            found[module] = float(((change @ hessian) * change).sum() / ((original @ hessian) * original).sum())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=_FIXTURES / "tiny-qwen3_5-moe")
    parser.add_argument("--grid", default="int4-g128")
    parser.add_argument("--samples", default="1,2,4,16")
    parser.add_argument("--modes", default="routed,balanced,all")
    parser.add_argument("--hessians", default="shared,own")
    parser.add_argument("--minimum", default="512", help="tokens that balanced gives each expert, several by commas")
    parser.add_argument("--fallback", type=int, default=1, help="experts with fewer tokens are rounded to nearest")
    parser.add_argument("--cold", type=int, default=128)
    parser.add_argument("--seeds", default="0,1,2")
    given = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    print(f"| samples of 256 | mode | Hessian of gate and up | cold modules | gate and up | down |\n|{'---|' * 6}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        judge = Judge(given.model, _FIXTURES / "text" / "heldout.txt", given.grid, work)
        run_plan(plan_for(given.model, given.grid, "rtn"), work / "out")
        rounded = judge.errors(rewritten("dequantize", {}, work / "out", work / "back"))
        shutil.rmtree(work / "out")
        for samples in map(int, given.samples.split(",")):
            cold: dict[int, set[str]] = {}
            settings = [
                (mode, hessian, minimum) for mode in given.modes.split(",") for hessian in given.hessians.split(",")
                for minimum in (map(int, given.minimum.split(",")) if mode == "balanced" else [0])
            ]  # fmt: skip
            for mode, hessian, minimum in settings:
                results = []
                for seed in map(int, given.seeds.split(",")):
                    options = CalibrationOptions(
                        sources=(DataSource(str(_FIXTURES / "text" / "calibration.txt")),), samples=samples, seed=seed,
                        sequence_length=256, experts=mode, expert_hessian=hessian, minimum_tokens=minimum,  # type: ignore[arg-type]
                        fallback_tokens=given.fallback, sequential=False,
                    )  # fmt: skip
                    run_calibrated(plan_for(given.model, given.grid, "gptq"), work / "out", options)
                    rows = read_log(work / "out" / LOG_NAME)
                    if mode == "routed" and seed not in cold:
                        downs = [row for row in rows if row.module.endswith("down_proj") and row.expert is not None]
                        few = {(row.layer, row.expert) for row in downs if row.tokens < given.cold}
                        cold[seed] = {row.module for row in rows if row.expert is not None and (row.layer, row.expert) in few}
                    errors = judge.errors(rewritten("dequantize", {}, work / "out", work / "back"))
                    shutil.rmtree(work / "out")
                    results.append({name: errors[name] for name in errors if name in cold[seed]})
                if (mode, hessian) == (settings[0][0], settings[0][1]):
                    _show(samples, "rtn", "", [{name: rounded[name] for name in found} for found in results])
                _show(samples, f"{mode}{f' {minimum}' if minimum else ''}", hessian, results)


def _show(samples: int, mode: str, hessian: str, results: list[dict[str, float]]) -> None:
    cells = []
    for parts in (("gate", "up"), ("down",)):
        ends = tuple(f"{part}_proj" for part in parts)
        means = [np.mean([error for name, error in found.items() if name.endswith(ends)]) for found in results if found]
        spread = np.std(means, ddof=1) if len(means) > 1 else 0.0
        cells.append(f"{np.mean(means):.4f} ± {spread:.4f}" if means else "none")
    print(f"| {samples} | {mode} | {hessian} | {sum(map(len, results))} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
