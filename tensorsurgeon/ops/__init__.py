"""One class per op: what can be done to tensors."""
