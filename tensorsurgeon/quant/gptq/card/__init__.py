"""GPTQ batched on a card: B Hessians, R rows that share each, the same algorithm as on the CPU in another order of sums."""
