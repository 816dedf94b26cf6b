"""Calibration: the layer walk, statistics of what linears see, and runs whose codes come from them.

The modules of this package import torch and transformers; this file does not, so that a plan can be asked what it needs.
"""
