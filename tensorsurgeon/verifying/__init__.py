"""Judge a finished checkpoint: is it what its index, its config and its record say, and what its source was?

An independent judge: what each layout looks like on disk is written down here once more, from the layouts' own
documentation and not from ``formats/``, so that a mistake of the writer is not repeated by the checker. A test
holds the two against each other on files that other tools made. Only headers, scales and other small tensors are
read, and every byte where a record or a source gives something to compare it with. NumPy only.
"""

from __future__ import annotations

from tensorsurgeon.verifying.findings import Fault, Note
from tensorsurgeon.verifying.judging import Verification, verify

__all__ = ["Fault", "Note", "Verification", "verify"]
