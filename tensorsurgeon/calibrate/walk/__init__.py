"""The model walked a layer at a time."""
