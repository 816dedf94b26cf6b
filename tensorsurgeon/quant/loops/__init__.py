"""Compiled loops, one module per subject, and how they come to run: compiled once, kept on disk, loaded without numba."""
