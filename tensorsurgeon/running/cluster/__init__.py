"""The nodes of a Ray cluster as one machine: who belongs to it, what each is given to do, and what is seen from there."""
