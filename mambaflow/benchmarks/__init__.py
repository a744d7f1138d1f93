"""Measurements of the parts side by side, as ratios within one run: a file for each part."""
