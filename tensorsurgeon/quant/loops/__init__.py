"""Compiled loops, one module per subject: compiled by numba at the first call, and kept between processes by its cache."""
