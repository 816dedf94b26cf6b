"""Quantization as mathematics: arrays in, arrays out; no names, no files."""
