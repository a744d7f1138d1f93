"""Compiled and fused operators: they know numbers alone, neither images nor models."""
