"""Resampling kernels: `(key, log_weights, n) -> ancestors (n,) int32`."""
