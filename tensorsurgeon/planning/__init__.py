"""From headers and transforms to a plan."""
