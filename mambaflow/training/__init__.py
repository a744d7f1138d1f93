"""The loop, its checkpoints, and one run from its configuration to its report."""
