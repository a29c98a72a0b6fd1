"""Measures of pictures as functions of numbers: features in, float64 figures out. No files, no networks."""
