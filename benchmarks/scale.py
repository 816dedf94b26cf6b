"""What one, four and sixteen machines would need, from what bench_ray.py measured on one node: the tables of docs/scale.md.

    python benchmarks/bench_ray.py --json FILE && python benchmarks/scale.py FILE [--cores 16] [--share 0.5] [--disk 1.0]

Takes the CPU seconds of each phase on one node of one core, says what two and four nodes would take and compares that with what
they took, and reckons with the same constants for Qwen3.6-35B-A3B. ``--share``: what a core gives while all of a machine's work
(../shared measurements: 16 threads did 7 to 9 times the work of one). ``--disk``: GB/s that the shared file system gives to all
nodes together, each way; an assumption, not a measurement.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

# Features of the distinct inputs of a linear-attention layer, as bench_ray's model has them: qkv and z, out, MLP, shared down.
_INPUTS = (2048, 4096, 2048, 512)
_PHASES = ("Watch", "SumUp", "Choose", "Forward")


class Constants:
    """CPU seconds of one core, of the run on one node."""

    def __init__(self, found: dict[str, Any]) -> None:
        (one,) = [run for run in found["measured"] if run["nodes"] == 1]
        self.tokens, self.layers, self.experts = found["tokens"], found["layers"], found["experts"]
        self.rtn = one["rtn"]["phases"]["units"]["all"] / (found["source_bytes"] / 1e9)
        self.phases = {name: one["gptq"]["phases"].get(name, {"all": 0.0})["all"] for name in _PHASES}
        self.rest = one["gptq"]["phases"].get("units", {"all": 0.0})["all"]
        # The first run of a process also loads what it computes with.
        self.alone = min(run["gptq"]["phases"]["alone"]["here"] for run in found["measured"])
        self.open = one["gptq"]["phases"]["open"]["all"]
        self.expert_share = one["expert_share"]

    def predicted(self, nodes: int) -> float:
        """CPU seconds on the longest way of the measured run with so many nodes of one core."""
        longest_sum = self.phases["SumUp"] * max(_INPUTS) ** 2 / sum(k**2 for k in _INPUTS)
        each = {name: seconds / nodes for name, seconds in self.phases.items()}
        return self.alone + sum(each.values()) - each["SumUp"] + max(each["SumUp"], longest_sum) + self.rest / nodes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path)
    parser.add_argument("--cores", type=int, default=16)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--disk", type=float, default=1.0)
    given = parser.parse_args()
    found = json.loads(given.figures.read_text())
    known = Constants(found)
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in known.phases.items())
    print(
        f"{found['layers']} layers of {found['experts']} experts, {found['tokens']} tokens, one core: RTN {known.rtn:.2f} CPU s "
        f"a GB of source; calibration {phases}, the rest {known.rest:.1f}, this machine alone {known.alone:.1f}; "
        f"to open {known.open:.1f} a node\n"
    )
    print("| nodes of one core | CPU s predicted | measured | speed-up | RTN predicted | measured | speed-up |")
    print("|---|---|---|---|---|---|---|")
    (first,) = [run for run in found["measured"] if run["nodes"] == 1]
    for run in found["measured"]:
        count, gptq, rtn = run["nodes"], run["gptq"]["path"], run["rtn"]["path"]
        alone = first["rtn"]["phases"]["alone"]["here"]
        print(
            f"| {count} | {known.predicted(count):.1f} | {gptq:.1f} | {first['gptq']['path'] / gptq:.2f} | "
            f"{alone + first['rtn']['phases']['units']['all'] / count:.2f} | {rtn:.2f} | {first['rtn']['path'] / rtn:.2f} |"
        )
    print()
    table(known, given.cores, given.share, given.disk)


def table(known: Constants, cores: int, share: float, disk: float) -> None:
    """Qwen3.6-35B-A3B: 40 layers of 256 experts; int4 from 131,072 tokens, with which each expert gets as many as it did here."""
    layers, experts, tokens, hidden = 40, 256, 131_072, 2048
    layer_gb, codes_gb, source_gb, int8_gb, int4_gb = 1.7, 0.85, 71.9, 38.4, 22.0
    by_tokens = tokens / known.tokens / known.layers
    choose = known.phases["Choose"] / known.layers
    choose *= known.expert_share * experts / known.experts + 1 - known.expert_share
    phases = {name: known.phases[name] * by_tokens for name in ("Watch", "SumUp", "Forward")} | {"Choose": choose}
    longest_sum = phases["SumUp"] * max(_INPUTS) ** 2 / sum(k**2 for k in _INPUTS)
    # Writing a layer's units grows with its bytes, most of which are experts.
    alone = known.alone / known.layers * experts / known.experts
    shown_gb = 2 * tokens * sum(_INPUTS) * 2 / 1e9
    states_gb = 4 * tokens * hidden * 2 / 1e9
    fed_gb = 2 * tokens * hidden * 2 / 1e9
    each = ", ".join(f"{name} {seconds:.0f}" for name, seconds in phases.items())
    print(
        f"Qwen3.6-35B-A3B on machines of {cores} cores that give {share:g} of a core each, a file system of {disk:g} GB/s; int4 "
        f"g128 from {tokens} tokens, each layer {each} core seconds, this machine alone {alone:.0f}:\n"
    )
    print("| machines | int8 RTN: cores, disk | int4 by calibration: cores | one core's sum | disk | alone | in all | scratch |")
    print("|---|---|---|---|---|---|---|---|")
    for machines in (1, 4, 16):
        workers = machines * cores * share
        rtn_cores, rtn_disk = known.rtn * source_gb / workers, max(source_gb, int8_gb) / disk
        sums = max(0.0, longest_sum - phases["SumUp"] / workers)
        busy = sum(phases.values()) / workers
        moved = machines * (layer_gb + codes_gb) + 2 * (shown_gb + states_gb + fed_gb)
        seconds = [layers * s for s in (busy, sums, moved / disk, alone)]
        shown = " | ".join(f"{s / 60:.0f} min" for s in seconds)
        print(
            f"| {machines} | {rtn_cores / 60:.1f} min, {rtn_disk / 60:.1f} min | {shown} | {sum(seconds) / 3600:.1f} h | "
            f"{shown_gb + states_gb + fed_gb:.0f} GB beside {int4_gb:.0f} |"
        )


if __name__ == "__main__":
    main()
