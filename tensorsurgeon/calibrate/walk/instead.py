"""What to do about a model that cannot be walked."""

from typing import Final

ROUND_INSTEAD: Final = "; {method}=rtn rounds to nearest, which needs no forward"
"""The remedy of such an error."""
