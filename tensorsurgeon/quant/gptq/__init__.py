"""Codes chosen from what inputs a weight meets."""
