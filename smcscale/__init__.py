"""smcscale: Sequential Monte Carlo for NumPyro programs and language models, in JAX.

A program that moves a state through time and scores it is a Feynman-Kac model, and one particle
engine runs them all. Start with `SMC(ParticleFilter(program), num_particles=...)`.
"""

from smcscale.engine.filter import ParticleFilter
from smcscale.feynman_kac import Capabilities, FeynmanKac, Weighted
from smcscale.program.spend import spend
from smcscale.run import SMC

__all__ = ["SMC", "Capabilities", "FeynmanKac", "ParticleFilter", "Weighted", "spend"]
