"""What becomes of a finished checkpoint: it is uploaded."""
