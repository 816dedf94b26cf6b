"""From YAML and names to ops."""
