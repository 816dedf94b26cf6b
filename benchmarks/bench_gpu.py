"""Calibration on a GPU: correct against the CPU, the same bytes twice, in how many seconds, in how much of the card's memory.

    python benchmarks/bench_gpu.py                        # everything, under eight minutes on an H100 or H200
    python benchmarks/bench_gpu.py --device cpu --small   # the same script at toy size, without a GPU
    python benchmarks/bench_gpu.py --only fixture,layers,kernels

Three parts, each of which stops the script if a bar is missed (unless --small):

- fixture: the trained fixture on the card and on the CPU: mean loss within 0.1 %, at least 90 % of codes equal, the same
  bytes twice, with other workers and another cap.
- layers: four layers of real shapes (hidden 2048, 256 experts of 512; the third has full attention), polished int4 g128, at
  65,536 and 262,144 tokens: seconds a layer (the first compiles and is not counted), peak memory; then under 12 GB.
- kernels: milliseconds a matrix and error beside llm-compressor's ``quantize_weight`` where it can be imported.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

FIXTURE = ROOT / "fixtures" / "tiny-qwen3_5-moe"
TEXT = ROOT / "fixtures" / "text" / "calibration.txt"


class LayerTimes(logging.Handler):
    """When each layer was finished, and what it said."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("layer %d of 0 to %d"):
            self.ends.append(time.monotonic())
            self.lines.append(record.getMessage())


@contextmanager
def layer_times() -> Any:
    times = LayerTimes()
    logger = logging.getLogger("tensorsurgeon.calibrate")
    logger.addHandler(times)
    logger.setLevel(logging.INFO)
    yield times
    logger.removeHandler(times)


def plan_of(source: Path, group_size: int) -> Any:
    from dataclasses import replace

    from tensorsurgeon.checkpoint.folder import open_checkpoint
    from tensorsurgeon.ops.quantize import Quantize
    from tensorsurgeon.planning.plan import make_plan
    from tensorsurgeon.planning.rewriting import steps_of
    from tensorsurgeon.recipes.library import load_transform

    steps = steps_of(load_transform("quantize-linears", {"format": "ct-packed", "num_bits": 4, "group_size": group_size}))
    return make_plan([replace(s, method="gptq") if isinstance(s, Quantize) else s for s in steps], open_checkpoint(source))


def calibrate(source: Path, target: Path, data: Path, *, samples: int, length: int, group_size: int, **running: Any) -> Any:
    from tensorsurgeon.calibrate.options import CalibrationOptions, DataSource
    from tensorsurgeon.calibrate.run import run_calibrated

    options = CalibrationOptions(sources=(DataSource(str(data)),), samples=samples, sequence_length=length)
    return run_calibrated(plan_of(source, group_size), target, options, **running)


def comparable(target: Path) -> dict[str, bytes]:
    """Every file of an output, the log without its seconds."""
    from tensorsurgeon.calibrate.log import LOG_NAME, read_log

    content = {p.name: p.read_bytes() for p in sorted(target.iterdir()) if p.is_file()}
    content[LOG_NAME] = repr([row._replace(seconds=0.0) for row in read_log(target / LOG_NAME)]).encode()
    record = json.loads(content["surgeon.json"])
    record.get("files", {}).pop(LOG_NAME, None)
    content["surgeon.json"] = json.dumps(record).encode()
    return content


def mean_loss(target: Path) -> float:
    from tensorsurgeon.calibrate.log import LOG_NAME, read_log

    found = [row.relative_loss for row in read_log(target / LOG_NAME) if row.relative_loss is not None]
    return sum(found) / len(found)


def equal_codes(one: Path, other: Path) -> tuple[float, float]:
    """Share of equal int4 codes, and of codes further than one apart."""
    from safetensors.numpy import load_file

    same = far = total = 0
    for path in sorted(one.glob("*.safetensors")):
        a, b = load_file(path), load_file(other / path.name)
        for name in a:
            if not name.endswith("weight_packed"):
                continue
            nibbles = [np.stack([t.view(np.uint8) & 15, t.view(np.uint8) >> 4]).astype(np.int8) for t in (a[name], b[name])]
            apart = np.abs(nibbles[0] - nibbles[1])
            same, far, total = same + int((apart == 0).sum()), far + int((apart > 1).sum()), total + apart.size
    return same / total, far / total


def bar(text: str, good: bool, small: bool) -> None:
    print(f"  {'holds' if good else 'MISSED'}: {text}", flush=True)
    if not good and not small:
        FAILED.append(text)


FAILED: list[str] = []


def fixture(device: str, work: Path, small: bool) -> None:
    """Part one."""
    asked: dict[str, Any] = {"samples": 8 if small else 160, "length": 64 if small else 256, "group_size": 32}
    seconds = {}
    runs: dict[str, dict[str, Any]] = {
        "cpu": {"device": "cpu"},
        "card": {"device": device, "workers": 16},
        "again": {"device": device, "workers": 1, "max_gpu_ram_bytes": 12_000_000_000},
    }
    for name, running in runs.items():
        began = time.monotonic()
        with worked_on_card(small and name != "cpu"):
            calibrate(FIXTURE, work / name, TEXT, **asked, **running)
        seconds[name] = time.monotonic() - began
    same, far = equal_codes(work / "card", work / "cpu")
    losses = {name: mean_loss(work / name) for name in runs}
    print(
        f"fixture, int4 g32, {asked['samples']} x {asked['length']} tokens: {seconds}; mean relative loss {losses}; "
        f"codes equal {same:.4f}, further than one apart {far:.6f}",
        flush=True,
    )
    bar("mean loss within 0.1 % of the CPU's", abs(losses["card"] / losses["cpu"] - 1) < 1e-3, small)
    bar("at least 90 % of codes equal", same >= 0.9, small)
    bar(
        "the same bytes twice, with other workers and another cap", comparable(work / "card") == comparable(work / "again"), small
    )
    record = json.loads((work / "card" / "surgeon.json").read_text())["calibration"]
    print(f"  the record says: {record['device']}, {record['versions']}", flush=True)


@contextmanager
def worked_on_card(pretend: bool) -> Any:
    """On a machine without a GPU, the card's way of working in plain torch."""
    from tensorsurgeon.calibrate import run

    before = run.works_on_card
    if pretend:
        run.works_on_card = lambda device: True
    try:
        yield
    finally:
        run.works_on_card = before


def write_model(target: Path) -> None:
    """Four layers of real shapes: the third has full attention, the others linear."""
    import make_bench_model as maker

    from tensorsurgeon.tensors.dtypes import dtype_named
    from tensorsurgeon.tensors.names import natural_key
    from tensorsurgeon.tensors.spec import TensorSpec

    skeleton = ROOT / "fixtures" / "qwen3.6-35b-a3b" / "qwen3.6-35b-a3b"
    tensors = json.loads(Path(f"{skeleton}.tensors.json").read_text())["tensors"]
    kinds = [0, 0, 3, 0]

    def specs(layers: int, _: int) -> list[Any]:
        found = []
        for name, (dtype, shape) in tensors.items():
            parts = name.split(".")
            if "visual" in parts or parts[0] == "mtp":
                continue
            if "layers" not in parts:
                found.append((name, dtype, [maker._VOCABULARY, *shape[1:]] if shape[0] == 248320 else shape))
                continue
            for new, old in enumerate(kinds[:layers]):
                at = f"model.language_model.layers.{old}."
                if name.startswith(at):
                    found.append((name.replace(at, f"model.language_model.layers.{new}."), dtype, shape))
        made = [TensorSpec(name, dtype_named(dtype), tuple(shape)) for name, dtype, shape in found]
        return sorted(made, key=lambda spec: natural_key(spec.name))

    def config(layers: int, _: int) -> dict[str, object]:
        known = json.loads(Path(f"{skeleton}.config.json").read_text())
        text = known["text_config"]
        text.update(
            num_hidden_layers=layers, layer_types=[text["layer_types"][kind] for kind in kinds[:layers]],
            vocab_size=maker._VOCABULARY, mtp_num_hidden_layers=0,
        )  # fmt: skip
        return dict(known)

    maker.bench_specs, maker.bench_config = specs, config
    total = maker.write_bench_model(target, layers=len(kinds), experts=256, shards=4)
    print(f"model of {len(kinds)} layers: {total / 1e9:.2f} GB", flush=True)


def layers(device: str, work: Path, small: bool, samples_of_runs: list[int]) -> None:
    """Part two."""
    length = 32 if small else 1024
    source = FIXTURE if small else work / "model"
    if not small:
        write_model(source)
    runs = [(2, None)] if small else [*((n, None) for n in samples_of_runs), (samples_of_runs[-1], 12_000_000_000)]
    made: dict[int, dict[str, bytes]] = {}
    for samples, cap in runs:
        np.save(work / "ids.npy", np.random.default_rng(0).integers(0, 2_000 if small else 50_000, (samples, length)))
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        began = time.monotonic()
        with layer_times() as times, worked_on_card(small and device == "cpu"):
            calibrate(
                source, work / "out", work / "ids.npy", samples=samples, length=length, group_size=128, device=device,
                max_gpu_ram_bytes=cap,
            )  # fmt: skip
        seconds = time.monotonic() - began
        ends = times.ends
        each = [later - earlier for earlier, later in pairwise(ends)]
        peak = 0 if device == "cpu" else torch.cuda.max_memory_allocated()
        reserved = 0 if device == "cpu" else torch.cuda.max_memory_reserved()
        print(
            f"{samples} x {length} tokens, cap {cap}: {seconds:.1f} s in all, first layer done after {ends[0] - began:.2f} s, "
            f"then {', '.join(f'{s:.2f}' for s in each)} s; mean relative loss {mean_loss(work / 'out'):.5f}; peak "
            f"{peak / 1e9:.2f} GB allocated, {reserved / 1e9:.2f} GB reserved; host "
            f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB",
            flush=True,
        )
        for line in times.lines:
            print(f"    {line}")
        wanted = {64: 3.5, 256: 5.0}.get(samples)
        if wanted and cap is None:
            # A layer's writing goes on beside the next one, so that what is between two ends varies with the disk.
            mean = sum(each[:2]) / 2
            bar(f"a layer in at most {wanted} s at {samples * length} tokens: {mean:.2f} s on average", mean <= wanted, small)
        if cap is not None:
            bar(f"peak under {cap / 1e9:.0f} GB", reserved < cap, small)
        if samples in made:
            bar("the same bytes under the cap", comparable(work / "out") == made[samples], small)
        elif samples == samples_of_runs[-1]:
            made[samples] = comparable(work / "out")
        shutil.rmtree(work / "out")


def batched(rows: int, columns: int, batch: int, device: str) -> tuple[Any, Any, Any]:
    """Weights, Hessians of correlated tokens with a few large features, and base scales."""
    seeded = torch.Generator(device=device).manual_seed(0)
    weight = (torch.randn(batch, rows, columns, generator=seeded, device=device) * 0.02).bfloat16().float()
    hessian = torch.empty(batch, columns, columns, device=device)
    for b in range(batch):
        mixing = torch.randn(columns, columns, generator=seeded, device=device) / columns**0.5
        inputs = torch.randn(2 * columns, columns, generator=seeded, device=device) @ mixing
        inputs[:, :: max(1, columns // 64)] *= 5
        hessian[b] = inputs.T @ inputs
    scale = (weight.view(batch, rows, -1, 128).abs().amax(-1) / 7.5).bfloat16().float()
    return weight, hessian, scale


def timed(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds of the second of two runs."""
    made = None
    seconds = 0.0
    for _ in range(2):
        if device != "cpu":
            torch.cuda.synchronize()
        began = time.perf_counter()
        made = work()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    return seconds, made


def kernels(device: str, small: bool) -> None:
    """Part three."""
    from tensorsurgeon.quant.gptq.card.gptq import Grid, dequantize, energy, gptq_batch
    from tensorsurgeon.quant.gptq.gptq import GptqOptions
    from tensorsurgeon.quant.gptq.polish import Polish

    def store(scale: torch.Tensor) -> torch.Tensor:
        return scale.bfloat16().float()

    shapes = [(16, 256, 2)] if small else [(1024, 2048, 32), (2048, 512, 64)]
    grid = Grid(qmin=-8, qmax=7, group_size=128, store_scale=store)
    for rows, columns, batch in shapes:
        weight, hessian, scale = batched(rows, columns, batch, device)
        whole = energy(weight, hessian).sum()
        damping = torch.full((batch,), 0.01, dtype=torch.float64, device=device)
        found = {}
        for name, options in (("searched", GptqOptions()), ("polished", GptqOptions(polish=Polish()))):
            run = partial(
                gptq_batch, weight, hessian, scale=scale, zero_point=None, damp_percent=damping, grid=grid, options=options
            )  # fmt: skip
            seconds, made = timed(run, device)
            change = weight - dequantize(made.codes, made.scale, None)
            found[name] = (seconds / batch, float(energy(change, hessian).sum() / whole))
        theirs = their_time(weight, hessian, scale)
        if theirs is not None:
            found["llm-compressor"] = theirs
        text = ", ".join(f"{name} {1e3 * s:.2f} ms at error {e:.6f}" for name, (s, e) in found.items())
        print(f"{batch} matrices of {rows} x {columns}, each: {text}", flush=True)
        if theirs is not None:
            seconds, error = found["searched"]
            bar(
                "searched: lower error than llm-compressor in at most its time", error < theirs[1] and seconds <= theirs[0], small
            )
            bar("polished: lower error still", found["polished"][1] < error, small)


def their_time(weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor) -> tuple[float, float] | None:
    """llm-compressor's batched ``quantize_weight`` on the same matrices; None where it is not installed."""
    import their_gptq

    try:
        return their_gptq.measure(weight, hessian, scale)
    except ImportError as error:
        print(f"  llm-compressor cannot be imported here ({error}); not measured")
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="toy sizes; bars are printed and not enforced")
    parser.add_argument("--only", default="fixture,kernels,layers")
    parser.add_argument("--samples", default="16,64,256", help="runs of so many times 1,024 tokens; the last again under 12 GB")
    parser.add_argument("--work", type=Path)
    given = parser.parse_args()
    name = "cpu" if given.device == "cpu" else torch.cuda.get_device_name(given.device)
    print(f"{name}, torch {torch.__version__}, {os.cpu_count()} cores", flush=True)
    with tempfile.TemporaryDirectory(dir=given.work) as folder:
        work = Path(folder)
        parts: dict[str, Callable[[], None]] = {
            "fixture": lambda: fixture(given.device, work, given.small),
            "kernels": lambda: kernels(given.device, given.small),
            "layers": lambda: layers(given.device, work, given.small, [int(n) for n in given.samples.split(",")]),
        }
        for part in given.only.split(","):
            began = time.monotonic()
            parts[part]()
            print(f"{part}: {time.monotonic() - began:.0f} s", flush=True)
    if FAILED:
        raise SystemExit(f"missed: {'; '.join(FAILED)}")


if __name__ == "__main__":
    main()
