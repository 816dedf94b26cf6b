"""Calibration by the nodes of a cluster: batches of the forward, sums, and codes, with the bits of one machine."""
