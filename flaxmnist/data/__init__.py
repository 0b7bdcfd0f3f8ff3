"""Data sets and the order of their images, with NumPy only."""
