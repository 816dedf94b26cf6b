"""Faults planted in good checkpoints, one kind a function, and the table of what ``verify`` finds of them.

python -m tests.verifying.plants                    every kind in every format: a quarter of an hour
python -m tests.verifying.plants --only ct-packed   one checkpoint
"""

from tests.verifying.plants import codes, configs, files, floats, headers, scales  # noqa: F401  # they register their kinds
