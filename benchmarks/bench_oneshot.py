"""End to end beside llm-compressor's `oneshot` GPTQ: KL to BF16 on held-out text, for the same tokens, linears and grids.

    python benchmarks/bench_oneshot.py [--grids int4-g32,int4-g128,int3-g128] [--seeds 0,1,2] [--settings default,routed-mse]
    python benchmarks/bench_oneshot.py --check     # exits 1 unless ours is no higher than each of theirs, in each grid

llmcompressor_env.sh makes llm-compressor's environment first (nothing to do where it is up to date); this file runs itself
there, with the very chunks that ours are calibrated on. Both tools write compressed-tensors' packed layout, symmetric, BF16
scales; both outputs are dequantized by ``surgeon apply dequantize`` and scored by bench_kl's Judge. The script stops unless
both quantized the same linears and their dequantized weights equal those in llm-compressor's live model, bit for bit.

`oneshot` also changes tensors that it does not quantize (norms pass through BF16 of 1 + w and back). Its quantized weights
are scored with the original's everything else, so that GPTQ alone differs; --as-saved scores its checkpoint as it is.
"Higher by" is how much a tool's KL is above that of ours, polished, in a sequence: mean and standard error over sequences.
Seconds are from reading the model to the written checkpoint, without imports; the median over seeds.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from bench_kl import Judge

    from tensorsurgeon.calibrate.options import CalibrationOptions

_ROOT = Path(__file__).parents[1]
_MODEL = _ROOT / "fixtures" / "tiny-qwen3_5-moe"
_TEXT = _ROOT / "fixtures" / "text"

# What of llm-compressor's defaults is changed. Those are: every expert sees every token, scales from the largest value,
# columns in order of activation with groups as they lie ("static"), damping 0.01, blocks of 128, quantized layers feed the next.
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "routed": {"oneshot": {"moe_calibrate_all_experts": False}},
    "mse": {"weights": {"observer": "memoryless_mse"}},
    "imatrix": {"weights": {"observer": "imatrix_mse"}},
    "unordered": {"gptq": {"actorder": None}},
    "routed-mse": {"oneshot": {"moe_calibrate_all_experts": False}, "weights": {"observer": "memoryless_mse"}},
    "routed-imatrix": {"oneshot": {"moe_calibrate_all_experts": False}, "weights": {"observer": "imatrix_mse"}},
}
OURS, PLAIN, THEIRS = "ours, polished", "ours, plain GPTQ", "llm-compressor"
# The linears of the decoder layers but routers and gates, as in our quantize-linears.
_IGNORE = ["lm_head", "re:.*visual.*", "re:.*mlp.gate$", "re:.*shared_expert_gate$"]


def serve_oneshot(orders: list[dict[str, Any]], threads: int) -> None:
    """The other interpreter: a checkpoint, the live model's weights and the seconds for each order."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    torch.set_num_threads(threads)
    for order in orders:
        folder, changed = Path(order["folder"]), SETTINGS[order["setting"]]
        tokens = np.load(order["tokens"])
        data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()})
        began = time.monotonic()
        with load_quantizable_moe(AutoModelForImageTextToText):
            model = AutoModelForImageTextToText.from_pretrained(order["model"], dtype=torch.bfloat16)
        weights = QuantizationArgs(
            num_bits=order["num_bits"], strategy="group", group_size=order["group_size"], symmetric=True,
            **changed.get("weights", {}),
        )  # fmt: skip
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        oneshot(
            model=model, processor=AutoTokenizer.from_pretrained(order["model"]), dataset=data,
            recipe=GPTQModifier(config_groups={"linears": scheme}, ignore=_IGNORE, **changed.get("gptq", {})),
            num_calibration_samples=len(tokens), max_seq_length=tokens.shape[1], shuffle_calibration_samples=False,
            **changed.get("oneshot", {}),
        )  # fmt: skip
        seconds = time.monotonic() - began
        live = {
            name: module.weight.detach().clone()
            for name, module in model.named_modules()
            if getattr(module, "quantization_scheme", None) is not None
        }
        began = time.monotonic()
        model.save_pretrained(folder / "saved", save_compressed=True)
        seconds += time.monotonic() - began
        save_file(live, folder / "live.safetensors")
        (folder / "seconds.json").write_text(json.dumps(seconds))


def run_oneshot(interpreter: Path, orders: list[dict[str, Any]], threads: int, work: Path) -> None:
    """Let the other interpreter do what is ordered; its log is shown only where it fails."""
    (work / "orders.json").write_text(json.dumps(orders))
    for order in orders:
        Path(order["folder"]).mkdir()
    command = [interpreter, __file__, "--serve-oneshot", work / "orders.json", "--workers", str(threads)]
    with open(work / "oneshot.log", "w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise SystemExit(f"{(work / 'oneshot.log').read_text()[-4000:]}\nllm-compressor's interpreter stopped with {code}")


def score_oneshot(judge: Judge, model: Path, folder: Path, planned: set[str], as_saved: bool, work: Path) -> dict[str, Any]:
    """Score the checkpoint in ``folder``, with the original's unquantized tensors unless ``as_saved``."""
    from tensorsurgeon.checkpoint.folder import open_checkpoint
    from tensorsurgeon.planning.plan import make_plan
    from tensorsurgeon.planning.rewriting import steps_of
    from tensorsurgeon.recipes.library import load_transform
    from tensorsurgeon.running.run import run_plan

    saved, back = open_checkpoint(folder / "saved"), work / "back"
    packed = {name.removesuffix(".weight_packed") for name in saved.specs if name.endswith(".weight_packed")}
    if packed != planned:
        raise SystemExit(
            "the tools quantized different linears, so their KL cannot be compared; "
            f"only ours: {sorted(planned - packed) or 'none'}; only llm-compressor: {sorted(packed - planned) or 'none'}"
        )
    run_plan(make_plan(steps_of(load_transform("dequantize", {})), saved), back)
    tensors, live = tensors_of(back), load_file(folder / "live.safetensors")
    unequal = [module for module in sorted(planned) if not torch.equal(tensors[f"{module}.weight"], live[module])]
    if unequal:
        raise SystemExit(f"dequantized weights are not those of llm-compressor's live model: {unequal}")
    if not as_saved:
        quantized = {f"{module}.weight" for module in planned}
        original = {name: tensor for name, tensor in tensors_of(model).items() if name in tensors and name not in quantized}
        shutil.rmtree(back)
        back.mkdir()
        save_file(tensors | original, back / "model.safetensors", {"format": "pt"})
        shutil.copy(model / "config.json", back)
    score = judge.score(back)
    seconds = json.loads((folder / "seconds.json").read_text())
    for done in (back, folder):
        shutil.rmtree(done)
    return {**score, "seconds": seconds}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def runs_for(
    judge: Judge, model: Path, grid: str, options: list[CalibrationOptions], interpreter: Path, settings: list[str],
    as_saved: bool, workers: int, work: Path,
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """Scores by tool, one of each seed's options."""
    from bench_kl import GRIDS, METHODS, measure, plan_for

    from tensorsurgeon.calibrate.data.data import load_data
    from tensorsurgeon.calibrate.walk.model import StreamedModel
    from tensorsurgeon.checkpoint.folder import open_checkpoint

    num_bits, group_size = GRIDS[grid]
    planned = set(plan_for(model, grid, "gptq").quantized)
    rows = StreamedModel(open_checkpoint(model), device="cpu").vocabulary_rows
    orders = []
    for number, option in enumerate(options):
        np.save(work / f"{number}.npy", load_data(option, model, rows).tokens)
        orders += [
            {
                "setting": setting, "folder": str(work / f"{setting}-{number}"), "tokens": str(work / f"{number}.npy"),
                "model": str(model), "num_bits": num_bits, "group_size": group_size,
            }
            for setting in settings
        ]  # fmt: skip
    run_oneshot(interpreter, orders, workers, work)
    runs: dict[str, list[dict[str, Any]]] = {}
    for order in orders:
        label = THEIRS if order["setting"] == "default" else f"{THEIRS}, {order['setting']}"
        score = score_oneshot(judge, model, Path(order["folder"]), planned, as_saved, work)
        runs.setdefault(label, []).append(score)
    plain = METHODS["gptq"]
    assert plain is not None
    for option in options:
        for name, own in ((PLAIN, replace(option, gptq=plain)), (OURS, option)):
            runs.setdefault(name, []).append(measure(judge, plan_for(model, grid, "gptq"), own, work, workers))
    return runs


def rows_of(grid: str, runs: dict[str, list[dict[str, Any]]], reference_nll: np.ndarray) -> list[dict[str, Any]]:
    """A row by tool; ``higher`` is by how much its KL is above that of ours in a sequence."""
    from bench_kl import row_of

    def by_sequence(name: str) -> np.ndarray:
        return np.stack([run["kl"] for run in runs[name]]).mean(0)

    rows = []
    for name, of_tool in runs.items():
        higher = by_sequence(name) - by_sequence(OURS)
        rows.append(
            {
                **row_of(grid, name, "", of_tool, reference_nll),
                # the median: other work on the machine has stretched single runs tenfold
                "seconds": statistics.median(run["seconds"] for run in of_tool),
                "of_theirs": float(by_sequence(name).mean() / by_sequence(next(iter(runs))).mean()),
                "higher": float(higher.mean()), "higher_se": float(higher.std(ddof=1) / math.sqrt(len(higher))),
            }
        )  # fmt: skip
    return rows


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "grid": lambda row: row["grid"],
    "tool": lambda row: row["method"],
    "KL": lambda row: f"{row['kl']:.5f} ± {row['kl_se']:.5f}",
    "between seeds": lambda row: f"{row['kl_between']:.5f}",
    "of llm-compressor's": lambda row: f"{row['of_theirs']:.3f}",
    "higher by": lambda row: "" if row["method"] == OURS else f"{row['higher']:+.5f} ± {row['higher_se']:.5f}",
    "NLL change": lambda row: f"{row['nll_change']:+.4f} ± {row['nll_se']:.4f}",
    "perplexity": lambda row: f"{row['perplexity']:.3f}",
    "s": lambda row: f"{row['seconds']:.1f}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=_MODEL)
    parser.add_argument("--text", type=Path, default=_TEXT / "heldout.txt")
    parser.add_argument("--calibration", default=str(_TEXT / "calibration.txt"))
    parser.add_argument("--environment", type=Path, default=_ROOT / ".venvs" / "llmcompressor", help="made if need be")
    parser.add_argument("--grids", default="int4-g32,int4-g128,int3-g128")
    parser.add_argument(
        "--settings",
        default="default,routed,routed-mse,routed-imatrix",
        help=f"of llm-compressor, of {', '.join(SETTINGS)}; the first is what shares are of",
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--samples", type=int, default=160)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=80, help="held-out sequences")
    parser.add_argument("--workers", type=int, default=2, help="and threads of llm-compressor's torch")
    parser.add_argument("--as-saved", action="store_true", help="score llm-compressor's checkpoints with all that they changed")
    parser.add_argument("--json", type=Path, help="also write the table here")
    parser.add_argument("--check", action="store_true", help="exit 1 unless ours is no higher than each of theirs")
    parser.add_argument("--serve-oneshot", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve_oneshot:
        serve_oneshot(json.loads(given.serve_oneshot.read_text()), given.workers)
        return
    from bench_kl import Judge, nll_of

    from tensorsurgeon.calibrate.options import CalibrationOptions, DataSource

    subprocess.run(["bash", Path(__file__).with_name("llmcompressor_env.sh"), given.environment], check=True, stdout=sys.stderr)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    judge = Judge(given.model, given.text, given.sequences)
    reference_nll = nll_of(judge)
    options = [
        CalibrationOptions(
            sources=(DataSource(given.calibration),), samples=given.samples, sequence_length=given.length, seed=seed
        )
        for seed in map(int, given.seeds.split(","))
    ]
    rows = []
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for grid in given.grids.split(","):
        with tempfile.TemporaryDirectory() as work:
            runs = runs_for(
                judge, given.model, grid, options, given.environment / "bin" / "python", given.settings.split(","),
                given.as_saved, given.workers, Path(work),
            )  # fmt: skip
        of_grid = rows_of(grid, runs, reference_nll)
        rows += of_grid
        print("\n".join(f"| {' | '.join(show(row) for show in COLUMNS.values())} |" for row in of_grid), flush=True)
    print(f"\nBF16 perplexity {math.exp(float(reference_nll.mean())):.3f} on {judge.ids.numel()} held-out tokens")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))
    missed = [row for row in rows if row["method"].startswith(THEIRS) and row["higher"] < 0]
    if given.check and missed:
        raise SystemExit("\n".join(f"{r['grid']}: {r['method']} has {-r['higher']:.5f} less KL than ours" for r in missed))


if __name__ == "__main__":
    main()
