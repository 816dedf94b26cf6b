"""What a tensor is and is called."""
