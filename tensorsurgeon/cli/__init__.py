"""The command line."""

from tensorsurgeon.cli.group import main, run

__all__ = ["main", "run"]
