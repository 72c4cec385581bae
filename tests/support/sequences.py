"""Laws of token sequences, held to enumeration."""

import jax
import numpy as np
import scipy.stats

from support.montecarlo import assert_mean


def sequence_masses(smc, length: int, vocabulary: int) -> np.ndarray:
    """Unnormalized mass `(R, V^L)` that each run gives every sequence; its sum is the evidence."""
    samples, _ = smc.get_samples(weighted=True)
    codes = np.asarray(samples["tokens"]) @ vocabulary ** np.arange(length)[::-1]
    weights = np.asarray(jax.nn.softmax(smc.result.log_weights, axis=1), np.float64)
    weights = np.nan_to_num(weights)  # a run whose particles are all dead counts as 0
    evidence = np.exp(np.asarray(smc.log_evidence, np.float64))
    rows = np.repeat(np.arange(weights.shape[0]), weights.shape[1])
    mass = np.zeros((weights.shape[0], vocabulary**length))
    np.add.at(mass, (rows, codes), (weights * evidence[:, None]).reshape(-1))
    return mass


def assert_sequences(mass, target, *, family: int, smallest_bias: float) -> None:
    """z-test of the evidence, chi-square of the masses of all sequences together.

    Args:
        mass: of `sequence_masses`.
        target: unnormalized, V^L numbers in any shape.
        family: comparisons of this kind in the file.
        smallest_bias: of the evidence, relative; see `assert_mean`.
    """
    exact = np.asarray(target, np.float64).reshape(-1)
    ratio = mass.sum(1) / exact.sum()
    if ratio.std() < 1e-5:  # nothing is weighed: the evidence is known
        np.testing.assert_allclose(ratio, 1.0, atol=1e-4)
    else:
        assert_mean(ratio, 1.0, family=family, smallest_bias=smallest_bias)
    assert mass[:, exact == 0].sum() == 0
    live = exact > 1e-3 * exact.sum()  # rarer sequences have no normal law yet
    error = (mass[:, live].mean(0) - exact[live]) / np.sqrt(exact[live])
    scaled = mass[:, live] / np.sqrt(exact[live])
    values, vectors = np.linalg.eigh(np.cov(scaled.T) / len(mass))
    seen = values > 1e-6 * values.max()  # where the evidence is known, so is one direction
    chi_square = np.sum((vectors.T @ error)[seen] ** 2 / values[seen])
    limit = scipy.stats.chi2.isf(1e-3 / family, seen.sum())
    assert chi_square < limit, f"chi-square {chi_square:.0f} of the law, limit {limit:.0f}"
