"""A command on a Ray cluster of its own, inside an allocation of a batch system."""
