"""Every kernel, trigger, tilt and proposal against exact evidence, filter and smoothing means.

The replicates are independent runs: `E[Z_hat] = Z` and `E[Z_hat f_hat] = Z E[f]` hold exactly at any
N, so the tests need no large population and see a bias of 2% of the evidence.
"""

import itertools

import jax
import numpy as np
import pytest

from smcscale.kernels import annealing, resampling, triggers
from support.cells import TILTS, TRIGGERS, replicates
from support.exact import MODELS
from support.montecarlo import assert_mean

KERNELS = ("multinomial", "stratified", "systematic", "residual", "ssp", "killing", "rejection")

CELLS = [
    (model, kernel, trigger, tilt, "bootstrap")
    for model, kernel, trigger, tilt in itertools.product(
        ("walk", "hmm"), KERNELS, ("always", "ess"), ("none", "floor")
    )
] + [
    ("walk" if (i % 2 == 0) else "hmm", "systematic", trigger, tilt, mode)
    for i, (trigger, tilt, mode) in enumerate(
        itertools.product(TRIGGERS, TILTS, ("bootstrap", "guided", "lookahead"))
    )
    # a tilt that is never used is no cell, and some stand above
    if not (trigger == "never" and tilt != "none")
    and not (tilt in ("none", "floor") and mode == "bootstrap" and trigger in ("always", "ess"))
]
assert len(CELLS) <= 120


@pytest.mark.statistical
@pytest.mark.parametrize(("model", "kernel", "trigger", "tilt", "mode"), CELLS)
def test_evidence_and_means_are_exact(model, kernel, trigger, tilt, mode):
    exact = MODELS[model]
    found = replicates(exact, kernel, trigger, tilt, mode)
    family = len(CELLS)
    assert_mean(found.ratio, 1.0, family=family, smallest_bias=0.02)
    family *= 1 + len(exact.smoothing_mean)
    assert_mean(found.filtered, exact.filter_mean, family=family, smallest_bias=0.06)
    assert_mean(found.smoothed, exact.smoothing_mean, family=family, smallest_bias=0.06)


@pytest.mark.statistical
def test_metropolis_converges_in_its_iterations():
    biases = []
    for iterations in (1, 4, 32):
        kernel = resampling.Metropolis(iterations)
        ratio = replicates(MODELS["walk"], kernel, "always", "none", "bootstrap").ratio
        biases.append((np.mean(ratio) - 1, np.std(ratio) / len(ratio) ** 0.5))
    # one iteration is far off, many are not
    assert abs(biases[0][0]) > 6 * biases[0][1]
    assert abs(biases[0][0]) > abs(biases[1][0]) > abs(biases[2][0]) - 4 * biases[2][1]
    assert abs(biases[2][0]) < 4 * biases[2][1]


@pytest.mark.statistical
def test_an_uncorrected_annealing_is_biased_and_gives_no_evidence():
    from smcscale import SMC, ParticleFilter

    exact = MODELS["walk"]
    uncorrected = annealing.Fixed(0.3, corrected=False)
    smc = SMC(
        ParticleFilter(exact.program, annealing=uncorrected, trigger=triggers.always),
        num_particles=64,
        num_runs=1000,
        progress_bar=False,
    )
    smc.run(jax.random.key(0), exact.data)
    with pytest.raises(ValueError, match="Fixed"):
        _ = smc.log_evidence
    ratio = np.exp(np.asarray(smc.result.log_evidence) - exact.log_evidence)
    assert abs(ratio.mean() - 1) > 6 * ratio.std() / len(ratio) ** 0.5
