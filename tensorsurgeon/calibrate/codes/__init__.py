"""From statistics to the codes of one layer."""
