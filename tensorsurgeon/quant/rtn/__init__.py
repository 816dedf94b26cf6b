"""Rounding to nearest: codes and scales from a weight alone."""
