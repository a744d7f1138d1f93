"""Completing held-out images, scoring them, and the classical fills to beat."""
