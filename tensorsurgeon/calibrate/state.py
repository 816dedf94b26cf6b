"""What a calibrated run goes on from: the next layer, with a digest of every piece that the finished ones left.

``.surgeon/calibration.json`` names the run, the layer and the pieces: the hidden states that go into it, the log of each
finished layer, and the statistics that were to be kept. A piece that is missing, damaged or another run's is found before
anything is calibrated on it. It lies beside the journal, which removes it with itself.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final

import xxhash

from tensorsurgeon.calibrate.log import LogRow, log_bytes, read_log
from tensorsurgeon.calibrate.walk.statistics import layer_path
from tensorsurgeon.checkpoint.sink import publish_bytes
from tensorsurgeon.errors import JournalError
from tensorsurgeon.machine.files import make_folder_durable

_STATE: Final = "calibration.json"
_BUFFER: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """``layer`` is the first that is not finished; ``states`` the digest of what goes into it, None where nothing does.

    ``logs`` and ``statistics`` are digests of one file per finished layer.
    """

    layer: int = 0
    states: str | None = None
    logs: tuple[str, ...] = ()
    statistics: tuple[str, ...] = field(default=())


class CalibrationState:
    """The pieces in ``folder``, of the run that ``fingerprint`` names; ``statistics`` is where those are kept, if they are."""

    def __init__(self, folder: Path, fingerprint: str, statistics: Path | None) -> None:
        self.folder = folder
        self._fingerprint = fingerprint
        self._statistics = statistics

    def read(self) -> Reached | None:
        """How far an earlier run came; None if there was none, JournalError if it cannot be believed."""
        path = self.folder / _STATE
        if not path.exists():
            return None
        try:
            known = json.loads(path.read_bytes())
            if known.pop("digest") != _digest_of(known):
                raise JournalError("is damaged", where=str(path))
            if known.pop("fingerprint") != self._fingerprint:
                raise JournalError("is another run's", where=str(path))
            lists = {name: tuple(known[name]) for name in ("logs", "statistics")}
            reached = Reached(layer=known["layer"], states=known["states"], **lists)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
            raise JournalError("is damaged", where=str(path)) from error
        self._check(reached)
        return reached

    def _check(self, reached: Reached) -> None:
        pieces = [(self.log_path(number), digest) for number, digest in enumerate(reached.logs)]
        if self._statistics is not None:
            pieces += [
                (layer_path(self._statistics, number), digest) for number, digest in enumerate(reached.statistics) if digest
            ]
        for path, digest in pieces:
            try:
                found = file_digest(path)
            except OSError as error:
                raise JournalError(f"cannot be read: {error.strerror}", where=str(path)) from error
            if found != digest:
                raise JournalError("is not the file that was written there", where=str(path))

    def begin(self, states: str | None) -> Reached:
        """Say that nothing is finished and ``states`` goes into the first layer."""
        return self._write(Reached(states=states))

    def advance(self, reached: Reached, rows: list[LogRow], states: str | None) -> Reached:
        """Say that a layer is finished: all that it wrote is durable, and ``states`` goes into the next."""
        number = reached.layer
        content = log_bytes(rows)
        publish_bytes(self.log_path(number), content)
        kept = ""
        if self._statistics is not None and layer_path(self._statistics, number).exists():
            kept = file_digest(layer_path(self._statistics, number))
        done = replace(
            reached, layer=number + 1, states=states, logs=(*reached.logs, _xxh(content)), statistics=(*reached.statistics, kept)
        )
        made = self._write(done)
        for path in (self.states_path(number), self.original_path(number)):
            path.unlink(missing_ok=True)
        return made

    def _write(self, reached: Reached) -> Reached:
        known = json.loads(json.dumps({**asdict(reached), "fingerprint": self._fingerprint}))
        publish_bytes(self.folder / _STATE, json.dumps({**known, "digest": _digest_of(known)}).encode())
        make_folder_durable(self.folder)
        return reached

    def rows(self, number: int) -> list[LogRow]:
        """The log of a finished layer."""
        return read_log(self.log_path(number))

    def log_path(self, number: int) -> Path:
        """The log of a layer."""
        return self.folder / f"log-{number:05d}.csv"

    def states_path(self, number: int) -> Path:
        """The hidden states that go into a layer."""
        return self.folder / f"hidden-{number:05d}.bin"

    @property
    def targets_path(self) -> Path:
        """What an original layer puts out, while its codes are tuned and nobody else keeps that."""
        return self.folder / "targets.bin"

    def original_path(self, number: int) -> Path:
        """What the original layers before a layer put out, where it is carried beside the hidden states."""
        return self.folder / f"original-{number:05d}.bin"


def file_digest(path: Path) -> str:
    """XXH3 of a file's bytes."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(_BUFFER):
            digest.update(block)
    return digest.hexdigest()


def _xxh(content: bytes) -> str:
    return str(xxhash.xxh3_128_hexdigest(content))


def _digest_of(known: dict[str, object]) -> str:
    return _xxh(json.dumps(known, sort_keys=True).encode())
