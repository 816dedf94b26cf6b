"""KL divergence to BF16 and perplexity on held-out text, for RTN, plain GPTQ, searched scales and polishing.

    python benchmarks/bench_kl.py [--seeds 0,1,2] [--grids int4-g32,int4-g128,int3-g128] [--methods rtn,gptq,searched,polished]
    python benchmarks/bench_kl.py --methods polished --vary experts=routed,all,balanced
    python benchmarks/bench_kl.py --check            # fails unless the targets of the calibration document are met

Every checkpoint is written by the same code as ``surgeon apply``, in compressed-tensors' packed layout, dequantized by
``surgeon apply dequantize`` and loaded by transformers. KL is the mean over held-out tokens of KL(BF16 || quantized), its
standard error is over sequences; a method's figure is the mean over calibration seeds, "between seeds" its spread.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensorsurgeon.calibrate.options import CalibrationOptions, DataSource
from tensorsurgeon.calibrate.run import run_calibrated
from tensorsurgeon.checkpoint.folder import open_checkpoint
from tensorsurgeon.ops.quantize import Quantize
from tensorsurgeon.planning.plan import Plan, make_plan
from tensorsurgeon.planning.rewriting import steps_of
from tensorsurgeon.quant.gptq.gptq import GptqOptions
from tensorsurgeon.quant.gptq.polish import Polish
from tensorsurgeon.recipes.library import load_transform
from tensorsurgeon.running.run import run_plan

_FIXTURES = Path(__file__).parents[1] / "fixtures"
_MODEL = _FIXTURES / "tiny-qwen3_5-moe"
_SEQUENCE = 250

GRIDS = {"int4-g32": (4, 32), "int4-g128": (4, 128), "int3-g128": (3, 128)}
# At most this share of RTN's KL, and of plain GPTQ's.
TARGETS = {"int4-g32": 0.7, "int4-g128": 0.7, "int3-g128": 0.55}
TARGET_OF_GPTQ = 0.9
METHODS: dict[str, GptqOptions | None] = {
    "rtn": None,
    "imatrix": GptqOptions(),
    "gptq": GptqOptions(search=None),
    "searched": GptqOptions(),
    "polished": GptqOptions(polish=Polish()),
}


class Judge:
    """Scores checkpoints on held-out text against the original model."""

    def __init__(self, model: Path, text: Path, sequences: int) -> None:
        from transformers import AutoTokenizer

        ids = torch.tensor(AutoTokenizer.from_pretrained(model)(text.read_text())["input_ids"])
        self.ids = ids[: min(sequences, len(ids) // _SEQUENCE) * _SEQUENCE].view(-1, _SEQUENCE)
        self.reference = list(_log_probabilities(model, self.ids))

    def score(self, folder: Path) -> dict[str, np.ndarray]:
        """Per sequence: mean KL(original || this), and mean negative log likelihood."""
        kl, nll = [], []
        targets = iter(self.ids.split(8))
        for ours, theirs in zip(self.reference, _log_probabilities(folder, self.ids), strict=True):
            kl.append((ours.exp() * (ours - theirs)).sum(-1).mean(1))
            batch = next(targets)
            nll.append(-theirs[:, :-1].gather(-1, batch[:, 1:, None])[..., 0].mean(1))
        return {"kl": torch.cat(kl).numpy(), "nll": torch.cat(nll).numpy()}


def _log_probabilities(folder: Path, ids: Tensor) -> Iterator[Tensor]:
    import transformers

    (name,) = transformers.AutoConfig.from_pretrained(folder).architectures
    model = getattr(transformers, name).from_pretrained(folder, dtype=torch.bfloat16, experts_implementation="eager").eval()
    with torch.inference_mode():
        for batch in ids.split(8):
            yield model(input_ids=batch, use_cache=False).logits.float().log_softmax(-1)


def plan_for(model: Path, grid: str, method: str) -> Plan:
    bits, group_size = GRIDS[grid]
    steps = steps_of(load_transform("quantize-linears", {"format": "ct-packed", "num_bits": bits, "group_size": group_size}))
    wanted: Any = method if method in ("rtn", "imatrix") else "gptq"
    return make_plan([replace(s, method=wanted) if isinstance(s, Quantize) else s for s in steps], open_checkpoint(model))


def measure(
    judge: Judge,
    plan: Plan,
    options: CalibrationOptions | None,
    work: Path,
    workers: int,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Make what is planned, and the scores of what a reader has of it; ``seconds`` of the conversion are the clock's."""
    began = clock()
    if options is None:
        run_plan(plan, work / "quantized", workers=workers)
    else:
        run_calibrated(plan, work / "quantized", options, workers=workers)
    seconds = clock() - began
    run_plan(make_plan(steps_of(load_transform("dequantize", {})), open_checkpoint(work / "quantized")), work / "back")
    scored = judge.score(work / "back")
    for name in ("quantized", "back"):
        shutil.rmtree(work / name)
    return {**scored, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=_MODEL)
    parser.add_argument("--text", type=Path, default=_FIXTURES / "text" / "heldout.txt")
    parser.add_argument("--calibration", default=str(_FIXTURES / "text" / "calibration.txt"))
    parser.add_argument("--grids", default=",".join(GRIDS))
    parser.add_argument("--methods", default="rtn,gptq,searched,polished")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--samples", type=int, default=160)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=80, help="held-out sequences")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--vary", help="an option and its values, such as experts=routed,all,balanced")
    parser.add_argument("--set", action="append", default=[], help="an option of every run, such as minimum_tokens=1024")
    parser.add_argument("--json", type=Path, help="also write the table here")
    parser.add_argument("--check", action="store_true", help="exit 1 unless the targets are met")
    given = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    judge = Judge(given.model, given.text, given.sequences)
    key, _, values = (given.vary or "=").partition("=")
    common = dict(setting.split("=") for setting in given.set)
    rows = []
    print(f"| grid | method | KL | between seeds | of RTN | of GPTQ | NLL change | perplexity | s |\n|{'---|' * 9}", flush=True)
    reference_nll = nll_of(judge)
    with tempfile.TemporaryDirectory() as folder:
        for grid in given.grids.split(","):
            base: dict[str, float] = {}
            for method in given.methods.split(","):
                for value in values.split(",") if method != "rtn" else [""]:
                    runs = []
                    for seed in [0] if method == "rtn" else map(int, given.seeds.split(",")):
                        options = None
                        if (gptq := METHODS[method]) is not None:
                            extra = {k: _typed(v) for k, v in {**common, **({key: value} if key else {})}.items()}
                            for name in [k for k in extra if k in GptqOptions.__dataclass_fields__]:
                                gptq = replace(gptq, **{name: extra.pop(name)})
                            options = CalibrationOptions(
                                sources=(DataSource(given.calibration),), samples=given.samples, seed=seed,
                                sequence_length=given.length, gptq=gptq, **extra,
                            )  # fmt: skip
                        plan = plan_for(given.model, grid, method)
                        runs.append(measure(judge, plan, options, Path(folder), given.workers))
                    row = row_of(grid, method, value, runs, reference_nll)
                    base.setdefault(method, row["kl"])
                    row["of_rtn"], row["of_gptq"] = (row["kl"] / base[m] if m in base else math.nan for m in ("rtn", "gptq"))
                    rows.append(row)
                    print(
                        f"| {grid} | {method}{' ' + value if value else ''} | {row['kl']:.5f} ± {row['kl_se']:.5f} | "
                        f"{row['kl_between']:.5f} | {row['of_rtn']:.3f} | {row['of_gptq']:.3f} | {row['nll_change']:+.4f} ± "
                        f"{row['nll_se']:.4f} | {row['perplexity']:.3f} | {row['seconds']:.1f} |", flush=True,
                    )  # fmt: skip
    print(f"\nBF16 perplexity {math.exp(float(reference_nll.mean())):.3f} on {judge.ids.numel()} held-out tokens")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))
    if given.check and (missed := _missed(rows)):
        raise SystemExit("\n".join(missed))


def _typed(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def nll_of(judge: Judge) -> np.ndarray:
    parts = [
        -ours[:, :-1].gather(-1, batch[:, 1:, None])[..., 0].mean(1)
        for ours, batch in zip(judge.reference, judge.ids.split(8), strict=True)
    ]
    return torch.cat(parts).numpy()


def row_of(grid: str, method: str, value: str, runs: list[dict[str, Any]], reference_nll: np.ndarray) -> dict[str, Any]:
    kl = np.stack([run["kl"] for run in runs])
    change = np.stack([run["nll"] - reference_nll for run in runs]).mean(0)
    over = kl.mean(0)
    return {
        "grid": grid, "method": method, "value": value, "kl": float(over.mean()),
        "kl_se": float(over.std(ddof=1) / math.sqrt(len(over))),
        "kl_between": float(kl.mean(1).std(ddof=1)) if len(runs) > 1 else 0.0,
        "nll_change": float(change.mean()), "nll_se": float(change.std(ddof=1) / math.sqrt(len(change))),
        "perplexity": math.exp(float((reference_nll + change).mean())),
        "seconds": sum(run["seconds"] for run in runs) / len(runs),
    }  # fmt: skip


def _missed(rows: list[dict[str, Any]]) -> list[str]:
    polished = [row for row in rows if row["method"] == "polished"]
    return [
        f"{row['grid']}: {row['of_rtn']:.3f} of RTN, {row['of_gptq']:.3f} of GPTQ"
        for row in polished
        if not (row["of_rtn"] <= TARGETS[row["grid"]] and row["of_gptq"] <= TARGET_OF_GPTQ)
    ]


if __name__ == "__main__":
    main()
