"""On-disk layouts of quantized weights: one file each, under one protocol."""
