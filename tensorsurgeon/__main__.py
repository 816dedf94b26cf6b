"""``python -m tensorsurgeon``: the command ``surgeon`` of this interpreter."""

from tensorsurgeon.cli import run

if __name__ == "__main__":
    run()
