"""Data sets and the order of their images, without JAX."""
