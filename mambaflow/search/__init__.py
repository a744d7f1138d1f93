"""Searches over configurations: what may be drawn, what was tried, and what came of it."""
