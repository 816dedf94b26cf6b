"""How far a quantized model is from the original: both walk the same tokens, a layer of each in memory."""
