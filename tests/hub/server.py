"""A Hub on loopback, which speaks as much of the Hub's API as ``huggingface_hub`` 2.4 uses for models.

Two addresses, as the real one: the Hub itself (127.0.0.1) redirects large files to where they are stored (localhost), and
clients must not send their token there. Asked for by this library's calls: ``model_info`` with files, ``hf_hub_download``,
``create_repo``, ``upload_folder`` without xet (preupload, LFS batch, PUT, commit). Xet itself is not spoken.

    python -m tests.hub.server FOLDER owner/name=MODEL ...
"""

from __future__ import annotations

import re
import sys
import tempfile
import threading
import time
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.hub.faults import Faults
from tests.hub.handler import Handler, Request
from tests.hub.repositories import Storage

TOKEN = "hf_of_the_tests"


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client that goes away is no fault."""


class Hub:
    """The server; ``requests`` is what it was asked so far."""

    def __init__(self, folder: Path) -> None:
        self.storage = Storage(folder)
        self.faults = Faults()
        self.requests: list[Request] = []
        self.tokens = {TOKEN}
        # Seconds that each megabyte of a stored file takes, so that a test can look at a run under way.
        self.seconds_per_mb = 0.0
        self.under_way = 0
        hub = self

        class Own(Handler):
            server_hub = hub

        self._server = _Quiet(("127.0.0.1", 0), Own)
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.stored_at = f"http://localhost:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def settle(self) -> None:
        """Wait until what was answered is noted."""
        until = time.monotonic() + 5
        while self.under_way and time.monotonic() < until:
            time.sleep(0.001)

    def sent_bytes(self, pattern: str = "") -> int:
        self.settle()
        return sum(r.nbytes for r in self.requests if re.search(pattern, r.path))

    def fetched(self) -> dict[str, int]:
        """How often each stored file was sent as a whole."""
        self.settle()
        return self.fetched_so_far()

    def fetched_so_far(self) -> dict[str, int]:
        """The same, while requests are answered."""
        counts: dict[str, int] = {}
        names = {b.sha256: n for r in self.storage.repositories.values() for c in r.commits.values() for n, b in c.items()}
        for request in self.requests:
            sha256 = request.path.rpartition("/")[2]
            whole = request.span is None and "/stored/" in request.path
            if request.method == "GET" and whole and request.nbytes == self.storage.blobs[sha256].nbytes:
                counts[names[sha256]] = counts.get(names[sha256], 0) + 1
        return counts


def main(folder: str, *models: str) -> None:
    """Serve until killed; the address is the first line."""
    hub = Hub(Path(tempfile.mkdtemp(dir=folder)))
    for model in models:
        name, _, path = model.partition("=")
        hub.storage.add_model(name, Path(path))
    print(hub.endpoint, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
