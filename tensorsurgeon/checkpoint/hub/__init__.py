"""Checkpoints that lie on the Hub: named, opened from headers alone, read by ranges, fetched shard by shard."""
