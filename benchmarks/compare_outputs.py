"""Whether this checkout writes the bytes that another one wrote: every built-in transform on the fixture, file by file.

    git worktree add ../before 2a4210b
    python benchmarks/compare_outputs.py --before ../before [--only ct-w4a16-g32]

Each transform runs once with each checkout, in its own process. Compared byte for byte is every file of the output
but the card and what it is made from; of surgeon.json the digests, since recipe, version and fingerprint say who wrote it.
Exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIXTURE = ROOT / "fixtures" / "tiny-qwen3_5-moe"

RAW_EXPORT = """description: Turn finished Quark names into those of a raw export.
steps:
  - unsqueeze: {where: "{path*}.weight_scale", axis: -1}
  - rename: {where: "{path*}.weight_scale", to: "{path}.weight_quantizer.scale"}
"""

# name: (transform, parameters, the run whose output it starts from; None is the fixture)
RUNS: dict[str, tuple[str, dict[str, str], str | None]] = {
    "autoround-int4-g128": ("autoround-int4-g128", {}, None),
    "awq-int4-g128": ("awq-int4-g128", {}, None),
    "ct-w4a16-g32": ("ct-w4a16-g32", {}, None),
    "ct-w4a16-g32 keep nothing": ("ct-w4a16-g32", {"keep": ""}, None),
    "ct-w4a16-g32 mtp=split": ("ct-w4a16-g32", {"mtp": "split"}, None),
    "ct-w8a16": ("ct-w8a16", {}, None),
    "ct-w8a8-int8": ("ct-w8a8-int8", {}, None),
    "fp8-block": ("fp8-block", {}, None),
    "fp8-block ct-float": ("fp8-block", {"format": "ct-float"}, None),
    "gptq-int4-g128": ("gptq-int4-g128", {}, None),
    "gptq-int4-g128 scope=all": ("gptq-int4-g128", {"scope": "all"}, None),
    "nvfp4a16": ("nvfp4a16", {}, None),
    "quark-w8a8-int8": ("quark-w8a8-int8", {}, None),
    "quantize-linears": ("quantize-linears", {}, None),
    "quantize-linears ct-mxfp4": ("quantize-linears", {"format": "ct-mxfp4"}, None),
    "quantize-linears quark-int4": ("quantize-linears", {"format": "quark-int4"}, None),
    "quantize-linears quark-fp8": ("quantize-linears", {"format": "quark-fp8"}, None),
    "split-experts": ("split-experts", {}, None),
    "fuse-experts": ("fuse-experts", {}, "split-experts"),
    "dequantize": ("dequantize", {}, "ct-w4a16-g32"),
    "dequantize fuse_experts": ("dequantize", {"fuse_experts": "true"}, "nvfp4a16"),
    "repack": ("repack", {"to": "ct-int"}, "quark-w8a8-int8"),
    "quark-export-rename": ("quark-export-rename", {}, "raw-export"),
    "raw-export": ("RAW", {}, "quark-w8a8-int8"),
}


def surgeon(checkout: Path, *arguments: str) -> str:
    """The standard output of ``surgeon`` as a checkout has it; its error ends this program."""
    code = "from tensorsurgeon.cli import run; run()"
    # Python looks for modules in the working folder before it looks anywhere else.
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{checkout}: surgeon {' '.join(arguments)}:\n{done.stderr}")
    return done.stdout


def run(checkout: Path, work: Path, name: str) -> Path:
    """The output folder of a run, made if it is not there."""
    transform, parameters, start = RUNS[name]
    target = work / name.replace(" ", "_")
    if target.exists():
        return target
    source = FIXTURE if start is None else run(checkout, work, start)
    if transform == "RAW":
        transform = str(work / "raw.yaml")
        Path(transform).write_text(RAW_EXPORT)
    if not (checkout / "tensorsurgeon" / "models").is_dir():
        # What a parameter was called and meant before there were roles.
        parameters = {"split_mtp": str(parameters["mtp"] == "split").lower()} if "mtp" in parameters else parameters
    sets = [word for key, value in parameters.items() for word in ("--set", f"{key}={value}")]
    # Shards small enough that there are several.
    surgeon(checkout, "apply", transform, str(source), str(target), "--quiet", "--max-shard-size", "2MB", *sets)
    return target


# Written for people since there are cards; before, the original's README went along under its own name.
FOR_PEOPLE = {"README.md", "README.base.md", "surgeon_plan.json"}


def differences(before: Path, after: Path) -> list[str]:
    """Files that are not the same in both folders, with what differs; those for people are left out."""
    names = sorted({p.name for folder in (before, after) for p in folder.iterdir()} - FOR_PEOPLE)
    found = []
    for name in names:
        left, right = before / name, after / name
        if not (left.exists() and right.exists()):
            found.append(f"{name}: only in {'the first' if left.exists() else 'the second'}")
        elif name == "surgeon.json":
            if json.loads(left.read_bytes())["shards"] != json.loads(right.read_bytes())["shards"]:
                found.append(f"{name}: digests differ")
        elif left.is_file() and left.read_bytes() != right.read_bytes():
            found.append(f"{name}: bytes differ")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    parser.add_argument("--only", action="append", help="a run by name; may be given several times")
    arguments = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only or RUNS:
            folders = []
            for label, checkout in (("before", arguments.before.resolve()), ("after", ROOT)):
                work = Path(folder) / label
                work.mkdir(exist_ok=True)
                folders.append(run(checkout, work, name))
            found = differences(*folders)
            failed = failed or bool(found)
            print(f"{name}: {'same bytes' if not found else '; '.join(found)}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
