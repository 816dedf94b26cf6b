"""Try every family of the table, one process each: python -m tests.families.run [FAMILY...] [--to docs/families.md]

`make families` runs it. Rows are kept in `.families/rows.json` as they come, so that a run can be taken up again with the
families that are left; the page is made from all rows that are there. A family that takes longer than --limit seconds, or
whose process dies, is a row like any other.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
import warnings
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch
import transformers

import tensorsurgeon.calibrate.run  # noqa: F401
from tests.families.build import model_of
from tests.families.page import page_of
from tests.families.table import FAMILIES
from tests.families.trial import Row, try_family

ROOT = Path(__file__).parents[2]
WORK = ROOT / ".families"


def child(name: str, folder: Path, answer: Connection) -> None:
    with open(folder.with_suffix(".log"), "w") as log:
        sys.stdout = sys.stderr = log
        warnings.simplefilter("ignore")
        answer.send(try_family(name, folder))


def in_its_own_process(name: str, limit: float) -> Row:
    """A forked process, which has transformers imported already and takes its memory with it when it ends."""
    WORK.mkdir(exist_ok=True)
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe(duplex=False)
    folder = WORK / name
    process = context.Process(target=child, args=(name, folder, its))
    process.start()
    its.close()
    try:
        if not mine.poll(limit):
            return Row(name, {"built": f"not done in {limit:.0f} s"})
        row: Row = mine.recv()
        return row
    except EOFError:
        process.join()
        return Row(name, {"built": f"its process ended with {process.exitcode}"})
    finally:
        process.kill()
        process.join()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*", metavar="FAMILY")
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "families.md")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one family")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    model_of(FAMILIES["llama"])  # imports what every child needs
    kept = WORK / "rows.json"
    rows = json.loads(kept.read_text()) if arguments.family and kept.exists() else {}
    for name in arguments.family or [name for name, family in FAMILIES.items() if family.built]:
        begun = time.monotonic()
        row = in_its_own_process(name, arguments.limit)
        rows[name] = asdict(row)
        wrong = {stage: word for stage, word in row.stages.items() if word != "right"}
        print(f"{name:20} {time.monotonic() - begun:5.1f} s  {wrong or 'right'}", flush=True)
        kept.write_text(json.dumps(rows, indent=1))
    arguments.to.write_text(page_of(rows))


if __name__ == "__main__":
    main()
