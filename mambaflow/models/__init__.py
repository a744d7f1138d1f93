"""The network: the selective scan, attention, the velocity field, and how its weights are read."""
