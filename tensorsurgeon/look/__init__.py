"""What lies on disk, shown and compared."""
