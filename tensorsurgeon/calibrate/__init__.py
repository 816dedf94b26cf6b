"""Calibration: the layer walk, statistics of what linears see, and runs whose codes come from them.

Imports torch and transformers, so nothing outside this package imports it at its top.
"""
