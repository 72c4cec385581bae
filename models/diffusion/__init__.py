"""Diffusion and flow models as programs that a particle filter runs.

    from smcscale import SMC, ParticleFilter
    from smcscale.models.diffusion import Denoiser, Steering, denoise, predictors, vp_cosine

    smc = SMC(ParticleFilter(denoise), num_particles=16)
    smc.run(key, Denoiser(network, predictors.eps), vp_cosine(100),
            Steering(reward, strength=10.0), shape=(8, 8))
    smc.get_samples()["x"][:, -1], smc.log_evidence

THE CONVENTION, kept in all modules; formulas of papers are translated into it:

* Level 0 is data, level K is noise. A state at level k is `x_k = alpha_k x_0 + sigma_k eps`, eps standard
  normal: `alpha` is the factor of the signal, `sigma` the standard deviation of the noise, for every kind
  of model (variance-preserving: `alpha^2 + sigma^2 = 1`, what papers call `sqrt(alpha_bar)`; exploding:
  `alpha = 1`; rectified flow: `alpha = 1 - sigma`).
* `tau` is what a network is told about a level: a time, a timestep or sigma. It grows with the noise.
* A filter's time t counts moves: row t goes from level K - t (`high`) down to level K - t - 1 (`low`), and
  `made` = t + 1 moves are then made. `made` = 0 is the initial noise, before the loop.
* `x0` and `eps` of a `Prediction` are the expectations of data and noise given the state.
* A reward is a number `r(x_0)`, `strength` is the lambda of `p(x_0) exp(lambda r(x_0))`.
* Log-weights are carried with all constants: the evidence estimates `E_p[exp(lambda r(x_0))]`, p the law
  of the sampler as it is run.

| module | idea |
|---|---|
| `schedules` | noise levels: VP, VE, EDM, rectified flow, any interpolant |
| `scheduler_config` | the same from the `scheduler_config.json` of published models |
| `predictors` | eps, `x_0`, v, score, velocity: one denoiser type |
| `samplers` | the law of a state one level lower: DDPM, DDIM, SDEs, churn, flow SDE |
| `potentials` | steering: rewards to log potentials with one target |
| `program` | `denoise`, the NumPyro program |
| `host_program` | `host_denoise`, for networks and rewards that run Python, such as those of `diffusers` |
| `twisted` | proposals that follow the reward's gradient, weighed for it: TDS, DAS |
| `correctors` | powers, products and tilts of models: Feynman-Kac correctors |
| `flow` | the flow as an ODE by adaptive steps, and the density it gives |
| `pieces` | network calls in pieces, for memory |
| `learned` | values of noisy states learned from noised data |
| `linear` | linear inverse problems with a conjugate proposal: MCGDiff |
| `search` | searches over noises and steps: calls spent for a high reward, no target |
| `mixtures` | Gaussian mixtures, where everything has an exact answer |
| `masked`, `reveal`, `guidance`, `token_steering` | masked diffusion of tokens: the program, rows, guidance, rewards |
| `ctmc`, `blocks` | tokens under uniform noise; blocks from left to right, and votes over schedules |
| `autoregressive` | images from coarse to fine, all tokens of a scale at once; diversity of clusters: TTS-VAR |
| `networks`, `judges`, `train` | the shipped digits, their classifiers, and how they were made |
| `scale_networks`, `train_scales` | the shipped digits from coarse to fine |
| `text`, `train_text` | shipped lines of arithmetic, masked; `fitting` is the loop that trained all of them |

Names of tokens' modules are used with the module's name: `masked.unmask`, `guidance.annealed`.
"""

from smcscale.models.diffusion import predictors as predictors
from smcscale.models.diffusion.autoregressive import Diversity as Diversity
from smcscale.models.diffusion.autoregressive import draw_scales as draw_scales
from smcscale.models.diffusion.correctors import Composed as Composed
from smcscale.models.diffusion.correctors import Corrected as Corrected
from smcscale.models.diffusion.correctors import PowerPath as PowerPath
from smcscale.models.diffusion.correctors import Tilt as Tilt
from smcscale.models.diffusion.correctors import bridge as bridge
from smcscale.models.diffusion.correctors import composed_start as composed_start
from smcscale.models.diffusion.correctors import target_score as target_score
from smcscale.models.diffusion.correctors import tempered_noise as tempered_noise
from smcscale.models.diffusion.host_program import host_denoise as host_denoise
from smcscale.models.diffusion.judges import load_judges as load_judges
from smcscale.models.diffusion.linear import LinearProblem as LinearProblem
from smcscale.models.diffusion.mixtures import ExactDenoiser as ExactDenoiser
from smcscale.models.diffusion.mixtures import ExactReverse as ExactReverse
from smcscale.models.diffusion.mixtures import GaussianMixture as GaussianMixture
from smcscale.models.diffusion.networks import load_denoiser as load_denoiser
from smcscale.models.diffusion.networks import pretrained as pretrained
from smcscale.models.diffusion.pieces import Pieces as Pieces
from smcscale.models.diffusion.pieces import in_pieces as in_pieces
from smcscale.models.diffusion.potentials import Exponential as Exponential
from smcscale.models.diffusion.potentials import Interval as Interval
from smcscale.models.diffusion.potentials import Polynomial as Polynomial
from smcscale.models.diffusion.potentials import Steering as Steering
from smcscale.models.diffusion.potentials import difference as difference
from smcscale.models.diffusion.potentials import maximum as maximum
from smcscale.models.diffusion.potentials import product as product
from smcscale.models.diffusion.potentials import total as total
from smcscale.models.diffusion.predictors import Denoiser as Denoiser
from smcscale.models.diffusion.predictors import Prediction as Prediction
from smcscale.models.diffusion.program import denoise as denoise
from smcscale.models.diffusion.samplers import DDIM as DDIM
from smcscale.models.diffusion.samplers import DDPM as DDPM
from smcscale.models.diffusion.samplers import EulerMaruyama as EulerMaruyama
from smcscale.models.diffusion.samplers import FlowSDE as FlowSDE
from smcscale.models.diffusion.samplers import Proposed as Proposed
from smcscale.models.diffusion.samplers import ancestral as ancestral
from smcscale.models.diffusion.samplers import churn as churn
from smcscale.models.diffusion.scale_networks import load_scales as load_scales
from smcscale.models.diffusion.scheduler_config import (
    read_scheduler_config as read_scheduler_config,
)
from smcscale.models.diffusion.schedules import Level as Level
from smcscale.models.diffusion.schedules import Schedule as Schedule
from smcscale.models.diffusion.schedules import edm as edm
from smcscale.models.diffusion.schedules import interpolant as interpolant
from smcscale.models.diffusion.schedules import rectified_flow as rectified_flow
from smcscale.models.diffusion.schedules import ve as ve
from smcscale.models.diffusion.schedules import vp_cosine as vp_cosine
from smcscale.models.diffusion.schedules import vp_linear as vp_linear
from smcscale.models.diffusion.twisted import NoisyLikelihood as NoisyLikelihood
from smcscale.models.diffusion.twisted import Sloped as Sloped
from smcscale.models.diffusion.twisted import Twisted as Twisted
