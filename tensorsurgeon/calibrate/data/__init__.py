"""Texts and token ids to calibrate on."""
