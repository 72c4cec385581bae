"""A few pictures of a run, with matplotlib: each draws on `ax` (a new one if None) and returns it.

| function | what it shows |
|---|---|
| `filter_bands` | a site given the data up to each step: mean and a band, with observations |
| `forecast` | the filter band going over into a fan of forecasts |
| `ess` | effective sample size over time, with a mark at every resampling |
| `genealogy` | the paths of the final particles, and where they meet |

Every function takes a `Result` or the `SMC` object that holds one.
"""

from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import jax.numpy as jnp
import numpy as np

from smcscale.readout import weighted_quantiles
from smcscale.result import Result, filter, is_real, sites

_COLOR = "C0"
_FAINT = "0.75"


def filter_bands(
    result: Any,
    site: str,
    observations: Any = None,
    *,
    dates: Any = None,
    level: float = 0.9,
    element: int | tuple[int, ...] = (),
    transform: Any = None,
    ax: Any = None,
) -> Any:
    """Mean and band of a site given the data up to each step.

    The band is between quantiles if the run kept paths, else mean +- z standard deviations, and
    the legend says which.

    Args:
        result: of a run.
        site: name of a site of the loop; `"state"` for the state of a plain Feynman-Kac model.
        observations: `(T,)`, drawn as dots.
        dates: `(T,)`, for the horizontal axis; step numbers by default.
        level: probability inside the band.
        element: index into a site that is an array.
        transform: increasing function applied to the site before drawing, such as
            `lambda x: jnp.exp(x / 2)`; the line is then the median (needs paths).
        ax: matplotlib axes.
    Returns:
        ax: with the time axis labelled and a legend.
    Raises:
        ValueError: unknown site, by name, with the known ones.
    """
    result, ax = _result(result), _axes(ax)
    times = np.arange(result.num_steps) if dates is None else np.asarray(dates)[: result.num_steps]
    band = _band(result, site, level, element, transform)
    _draw_band(ax, times, band, level, "filter")
    _observations(ax, times, observations)
    ax.set_ylabel(site)
    ax.legend(loc="best", fontsize="small")
    return _time_axis(ax, dates)


def forecast(
    predictions: dict[str, Any],
    site: str,
    *,
    result: Any = None,
    observations: Any = None,
    dates: Any = None,
    past: int = 100,
    level: float = 0.9,
    element: int | tuple[int, ...] = (),
    transform: Any = None,
    ax: Any = None,
) -> Any:
    """A fan of forecasts, after the last part of the filter band.

    Args:
        predictions: `{site: (K, num_steps, ...)}`, equally weighted, from `SMC.predict`.
        site: name of a site; an observed one too, whose past is `observations` alone.
        result: of the run the forecasts go on from.
        observations: `(T,)` of the past.
        dates: `(T + num_steps,)` for the horizontal axis; step numbers by default.
        past: how many past steps to show.
        level: probability inside the outer band; the inner one holds half (of it, below 0.5).
        element: index into a site that is an array.
        transform: increasing function applied to the site before drawing.
        ax: matplotlib axes.
    Returns:
        ax: with the time axis labelled and a legend.
    """
    ax = _axes(ax)
    if site not in predictions:
        raise ValueError(_unknown(site, predictions))
    draws = _pick(np.asarray(predictions[site]), 2, element)
    draws = draws if transform is None else np.asarray(transform(draws))
    result = None if result is None else _result(result)
    steps = 0 if result is None else result.num_steps
    steps = max(steps, 0 if observations is None else len(observations))
    times = np.arange(steps + draws.shape[1]) if dates is None else np.asarray(dates)
    shown = slice(max(steps - past, 0), steps)
    if result is not None and site in sites(result.moments.mean):
        band = _band(result, site, level, element, transform)
        _draw_band(ax, times[shown], tuple(x[shown] for x in band[:3]) + band[3:], level, "filter")
    if observations is not None:
        _observations(ax, times[shown], np.asarray(observations)[shown])
    ahead = times[steps : steps + draws.shape[1]]
    for inside, alpha in ((level, 0.2), (0.5 if level > 0.5 else level / 2, 0.3)):
        low, high = np.quantile(draws, [(1 - inside) / 2, (1 + inside) / 2], axis=0)
        text = f"forecast, {inside:.0%}"
        ax.fill_between(ahead, low, high, color="C1", alpha=alpha, lw=0, label=text)
    ax.plot(ahead, np.median(draws, 0), color="C1", lw=1.5, label="forecast, median")
    ax.set_ylabel(site)
    ax.legend(loc="best", fontsize="small")
    return _time_axis(ax, dates)


def ess(result: Any, run: int | None = None, *, dates: Any = None, ax: Any = None) -> Any:
    """Effective sample size over time as a share of N, with a mark at every resampling.

    Args:
        result: of a run.
        run: 0-based; None for a line of each run.
        dates: `(T,)` for the horizontal axis; step numbers by default.
        ax: matplotlib axes.
    Returns:
        ax: the marks sit on the weights that fired the trigger.
    """
    result, ax = _result(result), _axes(ax)
    times = np.arange(result.num_steps) if dates is None else np.asarray(dates)[: result.num_steps]
    share = np.asarray(result.diagnostics.ess) / np.asarray(result.diagnostics.num_particles)
    resampled = np.asarray(result.diagnostics.resampled)
    shown = range(result.num_runs) if run is None else [run]
    many = len(shown) > 1
    for r in shown:
        before = np.flatnonzero(resampled[r, 1:])  # the step whose weights were resampled
        name = (f"run {r + 1}" if many else "ESS / N") if r < 8 else None
        (line,) = ax.plot(times, share[r], lw=1, alpha=0.8, label=name)
        text = "resampled here" if r == shown[0] else None
        color = line.get_color()
        ax.plot(times[before], share[r, before], "v", ms=3.5, color=color, mec="none", label=text)
    ax.set_ylim(0, 1.02)
    ax.set_ylabel("effective sample size / N")
    ax.legend(loc="best", fontsize="small", ncols=2 if many else 1)
    return _time_axis(ax, dates)


def genealogy(
    result: Any,
    run: int = 0,
    *,
    site: str | None = None,
    element: int | tuple[int, ...] = (),
    num_paths: int = 60,
    last: int = 60,
    ax: Any = None,
) -> Any:
    """Paths of the final particles of one run, over all particles of the steps they crossed.

    Args:
        result: of a run with store="paths" (all particles in grey) or "ancestry".
        run: 0-based.
        site: vertical axis; the first real site by default.
        element: index into a site that is an array.
        num_paths: how many final particles to follow, by weight.
        last: how many of the last steps to show.
        ax: matplotlib axes.
    Returns:
        ax: titled with the number of distinct values at the first step shown.
    Raises:
        ValueError: when the run kept no paths.
    """
    result, ax = _result(result), _axes(ax)
    history = result.history
    if history is None:
        raise ValueError(
            'smcscale: a genealogy needs the past, and this run kept store="last".\n'
            '  try: ParticleFilter(..., store="paths") or "ancestry".'
        )
    chosen = _by_weight(np.asarray(result.log_weights)[run], num_paths)
    indices = np.zeros((result.num_runs, len(chosen)), np.int32)
    indices[run] = chosen
    paths = {k: v for k, v in sites(history.trace(jnp.asarray(indices))).items() if is_real(v)}
    site = next(iter(paths), "") if site is None else site
    if site not in paths:
        raise ValueError(_unknown(site, paths))
    traced = _pick(np.asarray(paths[site])[run], 2, element)
    first = max(result.num_steps - last, 0)
    times = np.arange(result.num_steps - traced.shape[1], result.num_steps)
    shown = times >= first
    if history.kind == "paths":
        everyone = _pick(np.asarray(sites(history.states)[site])[:, run], 2, element)[shown]
        every = everyone[:, :: max(1, everyone.shape[1] // 300)]
        label = "all particles" if every.shape == everyone.shape else "particles (some)"
        x = np.repeat(times[shown], every.shape[1])
        ax.plot(x, every.reshape(-1), ".", color=_FAINT, ms=2, zorder=1, label=label)
    lines = ax.plot(times[shown], traced[:, shown].T, color=_COLOR, lw=0.8, alpha=0.6, zorder=2)
    lines[0].set_label("paths of the final particles")
    roots = len(np.unique(traced[:, shown][:, 0]))
    text = f"{len(chosen)} final particles, {roots} distinct values at step {times[shown][0]}"
    ax.set_title(text, fontsize="medium")
    ax.set_ylabel(site)
    legend = ax.legend(loc="best", fontsize="small")
    for handle in legend.legend_handles:
        handle.set_alpha(1)  # else as faint as its lines
    return _time_axis(ax, None)


def _band(
    result: Result, site: str, level: float, element: Any, transform: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Middle, low, high `(T,)`, and how they were found."""
    table = filter(result)
    means = sites(table.mean)
    if site not in means:
        raise ValueError(_unknown(site, means))
    tail = (1 - level) / 2
    if result.history is not None and result.history.kind == "paths":
        low, middle, high = _pick(
            np.asarray(sites(table.quantiles([tail, 0.5, 1 - tail]))[site]), 2, element
        )
        mean = _pick(np.asarray(means[site]), 1, element)
        if transform is None:
            return mean, low, high, "mean"
        middle, low, high = (np.asarray(transform(x)) for x in (middle, low, high))
        return middle, low, high, "median"
    if transform is not None:
        raise ValueError(
            "smcscale: a transformed band needs quantiles, so the particles of every step.\n"
            '  try: ParticleFilter(..., store="paths"), or a `deterministic` site.'
        )
    mean, std = (_pick(np.asarray(sites(x)[site]), 1, element) for x in (table.mean, table.std))
    width = NormalDist().inv_cdf(1 - tail) * std
    return mean, mean - width, mean + width, "mean, band from std"


def _draw_band(ax: Any, times: Any, band: tuple, level: float, name: str) -> None:
    middle, low, high, kind = band
    text = f"{name}, {level:.0%}"
    ax.fill_between(times, low, high, color=_COLOR, alpha=0.4, lw=0, label=text, zorder=2)
    width = 1.2 if len(times) <= 1000 else 0.7
    ax.plot(times, middle, color=_COLOR, lw=width, label=f"{name}, {kind}", zorder=3)


def _observations(ax: Any, times: Any, observations: Any) -> None:
    if observations is not None:
        size, color = (5, "0.3") if len(times) <= 1000 else (2.5, "0.6")
        ax.plot(times, observations, ".", color=color, ms=size, label="observed", zorder=1)


def _by_weight(log_weights: np.ndarray, count: int) -> np.ndarray:
    """At most `count` particles, spread evenly over the weight of the population."""
    size = min(count, len(log_weights))
    weights = np.exp(log_weights - log_weights.max()) if np.isfinite(log_weights).any() else None
    if weights is None:
        return np.arange(size)
    points = (np.arange(size) + 0.5) / size
    return weighted_quantiles(np.arange(len(weights)), weights / weights.sum(), points)


def _pick(values: np.ndarray, leading: int, element: int | tuple[int, ...]) -> np.ndarray:
    """One element of the trailing axes."""
    index = element if isinstance(element, tuple) else (element,)
    if values.ndim - leading != len(index):
        raise ValueError(
            f"smcscale: the site has shape {values.shape[leading:]} at each step; `element` must "
            f"pick one number of it, got {element}."
        )
    return values[(slice(None),) * leading + index]


def _result(given: Any) -> Result:
    return given if isinstance(given, Result) else given.result


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "smcscale: pictures need matplotlib.\n  try: pip install 'smcscale[demo]'."
        ) from error
    return plt.subplots(figsize=(8, 3.5), layout="constrained")[1]


def _time_axis(ax: Any, dates: Any) -> Any:
    if dates is None:
        ax.set_xlabel("step")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return ax


def _unknown(site: str, known: Sequence[str] | dict) -> str:
    names = ", ".join(f'"{name}"' for name in known)
    return f'smcscale: there is no site "{site}".\n  try: one of {names}.'
