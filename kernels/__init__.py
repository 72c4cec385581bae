"""Swappable pieces of a particle filter: small functions on arrays."""
