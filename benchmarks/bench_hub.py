"""What a conversion streamed from the Hub takes of the disk and the network, beside one of a folder.

    python benchmarks/bench_hub.py [--layers 4] [--experts 71] [--shards 9] [--ahead 2] [--transform NAME] [--place FOLDER]
    python benchmarks/bench_hub.py --skeleton

The Hub is the tests' own on loopback, in this process; the model is ``make_bench_model.py``'s, 3.0 GB in 12 shards: stacks of
experts are larger than a ninth of it leaves room for, so that nine become twelve. Prints
what ``surgeon plan`` transferred, the disk that the run had at its fullest beside the output (looked at every 20 ms, in
blocks of the file system, of the target and the library's cache), seconds of the streamed run and of the same from a folder,
and whether the two records, which have a digest of every byte range and file, are the same. ``--skeleton`` plans a model of
72 GB, of which there are headers only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from make_bench_model import write_bench_model

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tensorsurgeon.checkpoint.layout import lay_out  # noqa: E402
from tensorsurgeon.tensors.dtypes import dtype_named  # noqa: E402
from tensorsurgeon.tensors.names import natural_key  # noqa: E402
from tensorsurgeon.tensors.spec import TensorSpec  # noqa: E402
from tests.hub.repositories import Blob, Repository  # noqa: E402
from tests.hub.server import Hub  # noqa: E402

SKELETON = ROOT / "fixtures" / "qwen3.6-35b-a3b"


def used_bytes(*folders: Path) -> int:
    total = 0
    for folder in folders:
        for at, _, names in os.walk(folder):
            for name in names:
                try:
                    total += (Path(at) / name).lstat().st_blocks * 512
                except FileNotFoundError:
                    continue
    return total


def surgeon(environment: dict[str, str], *arguments: str) -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "tensorsurgeon", *arguments], env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=71)
    parser.add_argument("--shards", type=int, default=9)
    parser.add_argument("--ahead", type=int, default=2)
    parser.add_argument("--transform", default="quark-w8a8-int8")
    parser.add_argument("--skeleton", action="store_true")
    parser.add_argument("--place", type=Path, default=None)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.place) as work:
        (Path(work) / "hub").mkdir()
        if given.skeleton:
            plan_skeleton(Path(work), given.transform)
        else:
            run(Path(work), given)


def environment_for(hub: Hub, cache: Path) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip


def plan_skeleton(work: Path, transform: str) -> None:
    """What a plan of the whole Qwen3.6-35B-A3B transfers: its headers over files full of holes."""
    tensors = json.loads((SKELETON / "qwen3.6-35b-a3b.tensors.json").read_text())["tensors"]
    specs = [TensorSpec(name, dtype_named(dtype), tuple(shape)) for name, (dtype, shape) in tensors.items()]
    layout = lay_out(sorted(specs, key=lambda spec: natural_key(spec.name)), {"format": "pt"}, 5_000_000_000)
    hub = Hub(work / "hub")
    config = (SKELETON / "qwen3.6-35b-a3b.config.json").read_bytes()
    files = {"config.json": hub.storage.add_bytes(config, "config.json")}
    files["model.safetensors.index.json"] = hub.storage.add_bytes(layout.index_json or b"", "model.safetensors.index.json")
    for number, shard in enumerate(layout.shards):
        path = work / "hub" / shard.name
        path.write_bytes(shard.header)
        os.truncate(path, shard.file_bytes)
        # Nobody reads so many zeros for their digest.
        files[shard.name] = Blob(path, shard.file_bytes, f"{number:040x}", f"{number:064x}", True)
        hub.storage.blobs[f"{number:064x}"] = files[shard.name]
    hub.storage.repositories["owner/whole"] = repository = Repository("owner/whole")
    repository.commit(files)
    seconds = surgeon(environment_for(hub, work / "cache"), "plan", transform, "owner/whole")
    total, sent = sum(shard.file_bytes for shard in layout.shards), hub.sent_bytes()
    print(f"plan      of {total / 1e9:.1f} GB in {len(layout.shards)} shards transferred {sent / 1e6:.2f} MB in {seconds:.1f} s")
    hub.close()


def run(work: Path, given: argparse.Namespace) -> None:
    model, cache, target = work / "model", work / "cache", work / "streamed"
    write_bench_model(model, layers=given.layers, experts=given.experts, shards=given.shards)
    hub = Hub(work / "hub")
    hub.storage.add_model("owner/model", model)
    environment = environment_for(hub, cache)
    sizes = [path.stat().st_size for path in model.glob("*.safetensors")]
    print(f"model     {sum(sizes) / 1e9:.2f} GB in {len(sizes)} shards of {max(sizes) / 1e6:.0f} MB at most")
    seconds = surgeon(environment, "plan", given.transform, "owner/model", "--json")
    sent = hub.sent_bytes()
    print(f"plan      transferred {sent / 1e6:.2f} MB, {100 * sent / sum(sizes):.3f} % of the model, in {seconds:.1f} s")

    most, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            most[0] = max(most[0], used_bytes(target, cache))

    watcher = threading.Thread(target=watch)
    watcher.start()
    streamed = surgeon(environment, "apply", given.transform, "owner/model", str(target), "--quiet", "--ahead", str(given.ahead))
    over.set()
    watcher.join()
    output = used_bytes(target)
    beside = most[0] - output
    print(f"disk      {most[0] / 1e9:.3f} GB at its fullest, of which the output {output / 1e9:.3f} GB")
    print(f"          beside it {beside / 1e6:.0f} MB: {beside / max(sizes):.2f} of the largest shard")
    counts = hub.fetched()
    print(f"fetched   {sum(counts.values())} shards, {sum(count > 1 for count in counts.values())} of them more than once")
    folder = surgeon(environment, "apply", given.transform, str(model), str(work / "local"), "--quiet")
    print(f"seconds   {streamed:.1f} streamed from loopback, {folder:.1f} from the folder")
    # The record has a digest of every range and file, as they were written; nothing else in it may differ but the source, which
    # the card and the plan beside it name.
    records = [json.loads((place / "surgeon.json").read_text()) for place in (target, work / "local")]
    for record in records:
        del record["files"]["README.md"], record["files"]["surgeon_plan.json"]
    came_from = records[0]["source"].pop("hub")
    print(f"the same  {records[0] == records[1]}")
    print(f"record    {came_from['repository']}@{came_from['commit']}, {len(came_from['shards'])} digests")
    hub.close()


if __name__ == "__main__":
    main()
