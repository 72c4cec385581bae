"""Shapes must agree as they are: no test of a kernel may pass by rank promotion."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_ranks():
    """Raise where arrays of different rank meet."""
    with jax.numpy_rank_promotion("raise"):
        yield
