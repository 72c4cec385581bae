"""The demo's part on diffusion: digits of the model, the best of a few, and steered ones.

`steering(picture)` draws sixteen of each with the score of both classifiers: the reward that steers and the
judge that saw other images.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smcscale.engine.filter import ParticleFilter
from smcscale.kernels import triggers
from smcscale.models.diffusion.judges import load_judges
from smcscale.models.diffusion.networks import load_denoiser, pretrained
from smcscale.models.diffusion.potentials import Interval, Steering
from smcscale.models.diffusion.program import denoise
from smcscale.models.diffusion.schedules import vp_linear
from smcscale.run import SMC

LABEL = 8
_STEPS, _PARTICLES, _RUNS, _SHOWN = 100, 4, 100, 16


def steering(picture: Path, resampling: Any) -> dict[str, float]:
    """Make digits in three ways at the same number of network calls a digit, print and draw them.

    Args:
        picture: file to write.
        resampling: kernel of the steered population.
    Returns:
        share of digits that the judge reads as the wanted one, by way.
    """
    print(f"\nDiffusion: digits steered to {LABEL}s, {_PARTICLES} particles, {_STEPS} steps")
    denoiser = load_denoiser(pretrained("digits"))
    classify, judge = load_judges(pretrained("digits-judges"))

    def reward(x):
        return classify(x)[LABEL]

    ways = {
        "the model's own": (1, triggers.never, Interval(start=_STEPS)),
        f"best of {_PARTICLES}": (_PARTICLES, triggers.never, Interval(start=_STEPS)),
        f"steered, {_PARTICLES} particles": (
            _PARTICLES,
            triggers.ess_below(0.5),
            Interval(every=5),
        ),
    }
    shares, rows = {}, []
    for name, (particles, trigger, scored) in ways.items():
        smc = SMC(
            ParticleFilter(denoise, resampling=resampling, trigger=trigger, store="last"),
            num_particles=particles, num_runs=_RUNS, progress_bar=False,
        )  # fmt: skip
        smc.run(
            jax.random.key(particles), denoiser, vp_linear(_STEPS),
            Steering(reward, strength=3.0, scored=scored), shape=(64,),
        )  # fmt: skip
        final: Any = smc.result.final
        best = jnp.argmax(final["reward"], axis=1)
        images = final["x"][jnp.arange(_RUNS), best]
        believed = float(jnp.exp(final["reward"][jnp.arange(_RUNS), best]).mean())
        right = float(np.mean(np.asarray(jax.vmap(judge)(images)) == LABEL))
        half = 1.96 * np.sqrt(right * (1 - right) / _RUNS)
        print(
            f"  {name:<22} the reward believes {believed:.2f}, the judge reads {right:.2f} "
            f"± {half:.2f} as {LABEL}; {_STEPS * particles} network calls a digit"
        )
        shares[name] = right
        rows.append((name, believed, right, np.asarray(images[:_SHOWN])))
    _draw(rows, picture)
    return shares


def _draw(rows: list, picture: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(rows), 1, figsize=(9, 3.4), layout="constrained")
    for ax, (name, believed, right, images) in zip(axes, rows, strict=True):
        strip = np.hstack([np.pad(i.reshape(8, 8), 1, constant_values=-1) for i in images])
        ax.imshow(strip, cmap="gray_r", vmin=-1, vmax=1)
        ax.set_title(
            f"{name}: reward's probability of {LABEL} {believed:.2f}, judge's share {right:.2f}",
            fontsize="medium", loc="left",
        )  # fmt: skip
        ax.axis("off")
    figure.savefig(picture, dpi=120)
    plt.close(figure)
