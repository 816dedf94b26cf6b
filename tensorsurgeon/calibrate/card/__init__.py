"""Calibration with everything on a CUDA device: forwards, sums, codes. Files, journal and log are those of any run."""
