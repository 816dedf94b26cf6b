"""What is known of model families: names, roles, and what engines fuse."""
