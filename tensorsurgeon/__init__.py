"""tensorsurgeon: checkpoint surgery, streamed from shard to shard."""
