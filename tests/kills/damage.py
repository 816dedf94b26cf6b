"""What happens to a stopped run's folder before somebody resumes it: each kind as a function of the folder and the source."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

Damage = Callable[[Path, random.Random], None]
KINDS: Final[dict[str, Damage]] = {}
# Files that a person put there, which a run leaves alone.
FOREIGN: Final = "notes.txt"


class CannotBe(Exception):  # no fault: this folder has nothing of what would be damaged
    """The folder has nothing that this damage touches."""


def kind(function: Damage) -> Damage:
    """Add a kind of damage under its function's name."""
    KINDS[function.__name__] = function
    return function


def _state(target: Path, name: str) -> Path:
    path = target / ".surgeon" / name
    if not path.exists():
        raise CannotBe
    return path


def _some(paths: Iterator[Path], rng: random.Random) -> Path:
    found = sorted(paths)
    if not found:
        raise CannotBe
    return rng.choice(found)


def _shard(target: Path, rng: random.Random) -> Path:
    return _some(target.glob("*.safetensors*"), rng)


def _lines(target: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path = _state(target, "journal.jsonl")
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


def _run(target: Path, **keys: Any) -> None:
    path = _state(target, "run.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def _flip(path: Path, rng: random.Random, count: int = 1, first: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    if len(raw) <= first:
        raise CannotBe
    for _ in range(count):
        raw[rng.randrange(first, len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


@kind
def journal_gone(target: Path, rng: random.Random) -> None:
    _state(target, "journal.jsonl").unlink()


@kind
def journal_empty(target: Path, rng: random.Random) -> None:
    _state(target, "journal.jsonl").write_bytes(b"")


@kind
def journal_torn(target: Path, rng: random.Random) -> None:
    path = _state(target, "journal.jsonl")
    raw = path.read_bytes()
    path.write_bytes(raw[: rng.randrange(len(raw) + 1)])


@kind
def journal_lines_lost(target: Path, rng: random.Random) -> None:
    _lines(target, lambda lines: [line for line in lines if rng.random() < 0.5])


@kind
def journal_lines_twice_and_mixed(target: Path, rng: random.Random) -> None:
    _lines(target, lambda lines: rng.sample(lines * 2, 2 * len(lines)))


@kind
def journal_of_garbage(target: Path, rng: random.Random) -> None:
    _state(target, "journal.jsonl").write_bytes(rng.randbytes(4096) + b"\n")


@kind
def journal_with_bits_flipped(target: Path, rng: random.Random) -> None:
    _flip(_state(target, "journal.jsonl"), rng, 20)


@kind
def journal_that_claims_every_unit(target: Path, rng: random.Random) -> None:
    lie = [b'{"unit": %d, "digests": ["0000000000000000"]}\n' % unit for unit in range(2000)]
    _lines(target, lambda lines: [*lie, *lines])


@kind
def journal_with_digests_exchanged(target: Path, rng: random.Random) -> None:
    def exchanged(lines: list[bytes]) -> list[bytes]:
        entries = [json.loads(line) for line in lines]
        return [
            json.dumps({"unit": a["unit"], "digests": b["digests"]}).encode() + b"\n"
            for a, b in zip(entries, entries[::-1], strict=True)
        ]

    _lines(target, exchanged)


@kind
def journal_with_numbers_that_are_none(target: Path, rng: random.Random) -> None:
    odd = [
        b'{"unit": -1, "digests": []}\n',
        b'{"unit": 1e400, "digests": []}\n',
        b'{"unit": null}\n',
        b"[]\n",
        b"[" * 9999 + b"\n",
    ]
    _lines(target, lambda lines: [*odd, *lines])


@kind
def run_gone(target: Path, rng: random.Random) -> None:
    _state(target, "run.json").unlink()


@kind
def run_empty(target: Path, rng: random.Random) -> None:
    _state(target, "run.json").write_bytes(b"")


@kind
def run_half(target: Path, rng: random.Random) -> None:
    path = _state(target, "run.json")
    path.write_bytes(path.read_bytes()[:-40])


@kind
def run_with_another_fingerprint(target: Path, rng: random.Random) -> None:
    _run(target, fingerprint="0" * 64)


@kind
def run_without_a_source(target: Path, rng: random.Random) -> None:
    _run(target, source=None)


@kind
def run_with_another_command(target: Path, rng: random.Random) -> None:
    known = json.loads(_state(target, "run.json").read_text())["command"]
    _run(target, command=["split-experts", *known[1:2]])


@kind
def shard_with_a_bit_flipped(target: Path, rng: random.Random) -> None:
    _flip(_shard(target, rng), rng)


@kind
def shards_with_many_bits_flipped(target: Path, rng: random.Random) -> None:
    for path in sorted(target.glob("*.safetensors*")):
        _flip(path, rng, 200)


@kind
def shard_header_flipped(target: Path, rng: random.Random) -> None:
    path = _shard(target, rng)
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(min(len(raw), 2000))] ^= 1
    path.write_bytes(raw)


@kind
def shard_cut(target: Path, rng: random.Random) -> None:
    path = _shard(target, rng)
    os.truncate(path, rng.randrange(path.stat().st_size))


@kind
def shard_longer(target: Path, rng: random.Random) -> None:
    with open(_shard(target, rng), "ab") as file:
        file.write(rng.randbytes(999))


@kind
def shard_gone(target: Path, rng: random.Random) -> None:
    _shard(target, rng).unlink()


@kind
def shards_gone(target: Path, rng: random.Random) -> None:
    for path in target.glob("*.safetensors*"):
        path.unlink()


@kind
def shard_of_zeros(target: Path, rng: random.Random) -> None:
    path = _shard(target, rng)
    path.write_bytes(bytes(path.stat().st_size))


@kind
def shards_exchanged(target: Path, rng: random.Random) -> None:
    found = sorted(target.glob("*.safetensors*"))
    if len(found) < 2:
        raise CannotBe
    found[0].rename(target / "between")
    found[1].rename(found[0])
    (target / "between").rename(found[1])


@kind
def shard_is_a_link(target: Path, rng: random.Random) -> None:
    path = _shard(target, rng)
    other = target.parent / "elsewhere.bin"
    shutil.copy(path, other)
    path.unlink()
    path.symlink_to(other)


@kind
def shard_is_a_folder(target: Path, rng: random.Random) -> None:
    path = _shard(target, rng)
    path.unlink()
    path.mkdir()


@kind
def state_is_a_file(target: Path, rng: random.Random) -> None:
    shutil.rmtree(target / ".surgeon")
    (target / ".surgeon").write_text("x")


@kind
def state_is_a_link(target: Path, rng: random.Random) -> None:
    (target / ".surgeon").rename(target.parent / "state")
    (target / ".surgeon").symlink_to(target.parent / "state")


@kind
def lock_gone(target: Path, rng: random.Random) -> None:
    _state(target, "lock").unlink()


@kind
def an_index_of_another(target: Path, rng: random.Random) -> None:
    (target / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')


@kind
def a_config_of_another(target: Path, rng: random.Random) -> None:
    (target / "config.json").write_text('{"model_type": "llama"}')


@kind
def a_record_of_another(target: Path, rng: random.Random) -> None:
    (target / "surgeon.json").write_text('{"fingerprint": "x", "shards": {}}')


@kind
def a_note_of_a_person(target: Path, rng: random.Random) -> None:
    (target / FOREIGN).write_text("do not lose me")


@kind
def states_flipped(target: Path, rng: random.Random) -> None:
    _flip(_some((target / ".surgeon").glob("hidden-*"), rng), rng, 50)


@kind
def states_cut(target: Path, rng: random.Random) -> None:
    path = _some((target / ".surgeon").glob("hidden-*"), rng)
    os.truncate(path, path.stat().st_size // 2)


@kind
def states_gone(target: Path, rng: random.Random) -> None:
    for path in [_some((target / ".surgeon").glob("hidden-*"), rng), *(target / ".surgeon").glob("hidden-*")]:
        path.unlink(missing_ok=True)


@kind
def layer_log_flipped(target: Path, rng: random.Random) -> None:
    _flip(_some((target / ".surgeon").glob("log-*"), rng), rng, 3)


@kind
def layer_log_gone(target: Path, rng: random.Random) -> None:
    _some((target / ".surgeon").glob("log-*"), rng).unlink()


@kind
def calibration_gone(target: Path, rng: random.Random) -> None:
    _state(target, "calibration.json").unlink()


@kind
def calibration_flipped(target: Path, rng: random.Random) -> None:
    _flip(_state(target, "calibration.json"), rng)


@kind
def calibration_says_a_later_layer(target: Path, rng: random.Random) -> None:
    path = _state(target, "calibration.json")
    known = json.loads(path.read_text())
    path.write_text(json.dumps({**known, "layer": known["layer"] + 1}))
