"""One run: the host loop over compiled blocks, its errors, and the result it leaves."""

import itertools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from smcscale import keys, placement, result, status
from smcscale.engine import compiled, host
from smcscale.engine.compiled import Meta, Sizes
from smcscale.engine.step import Info
from smcscale.engine.store import Ancestry, Kept, Live, Paths, extend, paths
from smcscale.feynman_kac import FeynmanKac
from smcscale.kernels.resampling import multinomial
from smcscale.progress import bar

#: `store="auto"` keeps whole paths up to this many bytes
_AUTO_BYTES = 512 * 2**20
#: steps of one compiled block, rounded to whole chunks
_BLOCK_STEPS = 256


class Segment(NamedTuple):
    first: int
    last: int
    num_particles: int


class Drive:
    """One run: the host loop over blocks, and what it gathered."""

    def __init__(self, smc: Any, key: Array, args: tuple, kwargs: dict, num_steps: int | None):
        self.smc = smc
        self.filter = smc.algorithm
        program = self.filter.program
        self.host: FeynmanKac | None = None
        if isinstance(program, FeynmanKac) and program.capabilities.host:
            self.host, self.filter = program, host.compiled_part(self.filter)
        self.key = key
        self.args, self.kwargs = args, kwargs
        self.num_steps = num_steps
        self.run_keys = keys.run_keys(key, smc.num_runs)
        self.eve = self.filter.resampling is multinomial
        self.infos: list[Info] = []
        self.lengths: list[int] = []  # rows of each that count
        self.kept: list[Kept] = []
        self.ancestry: Live | None = None
        self.done = 0
        probe = Sizes(smc.num_islands, smc.num_runs, smc.num_islands, num_steps)
        if callable(smc.num_particles) or isinstance(smc.num_particles, Sequence):
            self.meta = compiled.describe(self.filter, self.run_keys, probe, args, kwargs)
            self.segments = schedule(smc, self.meta)
            placement.check([segment.num_particles for segment in self.segments])
            first = self.segments[0].num_particles
        else:
            first = smc.num_particles
            placement.check([first])
        self.population, self.initial, self.meta = compiled.start(
            self.filter, self.run_keys, self.sizes(first), args, kwargs, self.eve
        )
        self.segments = schedule(smc, self.meta)
        self.store = self._choose_store()
        self.resized = [s.first for s in self.segments[1:]]

    def sizes(self, num_particles: int) -> Sizes:
        return Sizes(num_particles, self.smc.num_runs, self.smc.num_islands, self.num_steps)

    def _choose_store(self) -> str:
        store = self.filter.store
        need = memory(self.smc, self.meta, self.segments)
        if store == "auto":
            small = need["paths"] <= _AUTO_BYTES and len(self.segments) == 1
            store = "paths" if small else "last"
            if not small:
                print(
                    f"smcscale: keeping the last step only ({need['paths'] / 2**20:.0f} MB for "
                    'paths); store="paths" or "ancestry" keeps more.'
                )
        elif store != "last" and len(self.segments) > 1:
            raise ValueError(
                f'smcscale: store="{store}" needs one number of particles; the schedule changes '
                f"it at step {self.segments[1].first}.\n"
                '  try: store="last".'
            )
        total = need["particles"] + (need["paths"] if store == "paths" else 0)
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if jax.default_backend() == "cpu" and total > available:
            lower = "num_particles or num_runs" + (
                ', or store="last"' if store == "paths" and need["particles"] < available else ""
            )
            raise MemoryError(
                f"smcscale: the run needs about {total / 2**30:.1f} GiB, the machine has "
                f"{available / 2**30:.1f} GiB.\n  try: lower {lower}."
            )
        return store

    def loop(self) -> None:
        meta, first = self.meta, self.meta.first
        self._raise(self.population.status)
        before: status.Status | None = None
        with bar(meta.num_steps, self.smc.progress_bar) as update:
            size = self.segments[0].num_particles
            for segment in self.segments:
                if segment.num_particles != size:
                    self.population = compiled.resize(
                        self.filter,
                        self.run_keys,
                        self.sizes(size),
                        self.args,
                        self.kwargs,
                        self.population,
                        segment.num_particles,
                    )
                    size = segment.num_particles
                start = max(segment.first, first)
                steps = 1 if self.host else _block(segment.last - start, meta.chunk)
                while start < segment.last:
                    stop = min(start + steps, segment.last)
                    info, now = self.block(steps, stop, size)
                    self.infos.append(info)
                    self.lengths.append(stop - start)
                    self.done = start = stop
                    if self.host is not None:
                        self._raise(now)
                    elif before is not None:
                        # one block late, so that reading it waits for nothing
                        self._raise(before)
                    before = now
                    last = self.lengths[-1] - 1
                    update(stop, lambda i=info, t=last: (i.ess[t], i.log_evidence[t]))
        if before is not None:
            self._raise(before)
        self._raise_dead(self.population.status)

    def block(self, steps: int, stop: int, size: int) -> tuple[Info, status.Status]:
        start = self.done if self.done else self.meta.first
        keep = self.store != "last"
        fixed = (
            self.filter,
            self.run_keys,
            self.sizes(size),
            self.args,
            self.kwargs,
            (steps, keep),
            jnp.asarray(stop, jnp.int32),
        )
        if self.host is None:
            self.population, info, kept, now = compiled.block(fixed, self.population)
        else:
            self.population, info, kept, now = host.step(self.host, fixed, self.population)
        if kept is not None:
            kept = jax.tree.map(lambda x: x[: stop - start], kept)
            if self.store == "paths":
                self.kept.append(kept)
            else:
                self.ancestry = extend(self.ancestry, kept)
        return info, now

    # ---- errors

    def _raise(self, found: status.Status) -> None:
        codes = np.asarray(found.code)
        if codes.any():
            run = int(np.flatnonzero(codes)[np.argmin(np.asarray(found.time)[codes != 0])])
            self._fail(int(codes[run]), int(found.time[run]), run)

    def _raise_dead(self, found: status.Status) -> None:
        dead = np.asarray(found.dead_time)
        if self.smc.on_dead == "raise" and (dead > -2).all():
            run = int(dead.argmin())
            self._fail(status.ALL_DEAD, int(dead[run]), run)

    def _fail(self, code: int, row: int, run: int) -> None:
        """Find the site by replaying up to the step that failed, and raise."""
        size = next(
            (s.num_particles for s in self.segments if s.first <= row < s.last),
            self.segments[0].num_particles,
        )
        # a host model is not asked again: its answers may cost money, and differ
        told, nan_leaves = ({}, []) if self.host else self._replay(row)
        culprits: dict[str, str] = {}
        if code == status.BROKEN_STATE:
            culprits = {name: "its value is NaN" for name in nan_leaves}
        for site, values in told.items():
            found = _count(np.asarray(values)[run])
            bad = found["NaN"] + found["+inf"]
            if (code == status.BROKEN_POTENTIAL and bad) or (
                code == status.ALL_DEAD and found["-inf"]
            ):
                text = ", ".join(f"{n} are {kind}" for kind, n in found.items() if n)
                culprits[site] = f"log potentials: {text}"
        raise FloatingPointError(status.message(code, row, run, self.smc.num_runs, size, culprits))

    def _replay(self, row: int) -> tuple[dict, list[str]]:
        """Log potentials by site of the step that failed, and the sites whose value is NaN."""
        first = self.segments[0].num_particles
        population, _, _ = compiled.start(
            self.filter, self.run_keys, self.sizes(first), self.args, self.kwargs, self.eve
        )
        if row < self.meta.first:
            told, record = compiled.explain(
                self.filter, self.run_keys, self.sizes(first), self.args, self.kwargs, None
            )
            return told, _nan_leaves(record)
        size = first
        for segment in self.segments:
            if segment.num_particles != size:
                population = compiled.resize(
                    self.filter,
                    self.run_keys,
                    self.sizes(size),
                    self.args,
                    self.kwargs,
                    population,
                    segment.num_particles,
                )
                size = segment.num_particles
            start = max(segment.first, self.meta.first)
            steps = _block(segment.last - start, self.meta.chunk)
            while start < min(segment.last, row):
                stop = min(start + steps, segment.last, row)
                fixed = (
                    self.filter,
                    self.run_keys,
                    self.sizes(size),
                    self.args,
                    self.kwargs,
                    (steps, self.store != "last"),
                    jnp.asarray(stop, jnp.int32),
                )
                population, _, _, _ = compiled.block(fixed, population)
                start = stop
            if row < segment.last:
                break
        told, record = compiled.explain(
            self.filter, self.run_keys, self.sizes(size), self.args, self.kwargs, population
        )
        return told, _nan_leaves(record)

    # ---- results

    def result(self, seconds: float) -> result.Result:
        pop, meta, smc = self.population, self.meta, self.smc
        size = pop.log_weights.shape[1]
        before, final, after = compiled.finish(
            self.filter,
            self.run_keys,
            self.sizes(size),
            self.args,
            self.kwargs,
            pop,
            meta.has_readout,
        )
        opening = self.initial._replace(costs={}, ancestors=None) if meta.first else None
        told, spent = compiled.joined(self.infos, opening, tuple(self.lengths))
        counts = np.concatenate(
            [np.full(s.last - s.first, s.num_particles, np.int32) for s in self.segments]
        )[: self.done]
        resampled = np.array(told.resampled)
        for row in self.resized:
            if row < self.done:
                resampled[:, row] = True
        diagnosed = result.Diagnostics(
            ess=told.ess,
            resampled=jnp.asarray(resampled),
            unique_ancestors=told.unique_ancestors,
            beta=told.beta,
            log_evidence=told.log_evidence,
            num_particles=counts,
            initial=result.Initial(self.initial.ess, self.initial.log_evidence),
            dead_time=pop.status.dead_time,
        )
        moments = compiled.moments_structure(final, not isinstance(self.filter.program, FeynmanKac))
        costs = {
            "particle_steps": float(counts[meta.first :].sum()) * smc.num_runs,
            "resampled_particles": float((resampled * counts).sum()),
            "seconds": seconds,
        }
        for name, values in spent.items():
            costs[name] = float(np.asarray(values, np.float64).sum())
        return result.Result(
            log_evidence=pop.log_evidence,
            log_weights=pop.log_weights,
            before=before,
            final=final,
            after=after,
            eve=pop.eve,
            num_resamplings=pop.num_resamplings,
            moments=result.Moments(
                jax.tree.unflatten(moments, told.mean),
                jax.tree.unflatten(moments, told.variance),
            ),
            history=self._history(final),
            diagnostics=diagnosed,
            cost=costs,
            biases=self.filter.biases,
            key_data=jax.random.key_data(self.key),
            warnings=_static_warning(meta),
        )

    def _history(self, final: Any) -> Paths | Ancestry | None:
        structure = jax.tree.structure(final)
        if self.store == "paths":
            return paths(self.kept, structure)
        if self.ancestry is not None:
            return Ancestry(*self.ancestry, structure)
        return None


def _static_warning(meta: Meta) -> tuple[str, ...]:
    if not meta.parameters:
        return ()
    names = ", ".join(f'"{n}"' for n in meta.parameters)
    line = (
        f"{names} drawn before the loop and read inside it: a static parameter degenerates under "
        "resampling; use `condition`, or a method for parameters (SMC2, PMMH, ParticleGibbs)."
    )
    return (line,)


def schedule(smc: Any, meta: Meta) -> list[Segment]:
    """Segments of constant N from `num_particles`."""
    given, steps = smc.num_particles, meta.num_steps
    numbers: list[Any]
    if callable(given):
        numbers = [given(t) for t in range(steps)]
    elif isinstance(given, Sequence):
        numbers = list(given)
        if len(numbers) != steps:
            raise ValueError(
                f"smcscale: `num_particles` lists {len(numbers)} numbers; there are {steps} rows.\n"
                "  try: one number for each row, or a function of the row."
            )
    else:
        return [Segment(0, steps, int(given))]
    for n in numbers:
        positive("num_particles", n)
        divisible(n, smc.num_islands)
    edges = [t for t in range(steps) if t == 0 or numbers[t] != numbers[t - 1]] + [steps]
    return [Segment(a, b, numbers[a]) for a, b in itertools.pairwise(edges)]


def _block(num_steps: int, chunk: int) -> int:
    """Steps of a block: about `_BLOCK_STEPS`, in whole chunks of noise."""
    chunks = max(1, -(-num_steps // chunk))
    blocks = max(1, round(chunks * chunk / _BLOCK_STEPS))
    return -(-chunks // blocks) * chunk


def memory(smc: Any, meta: Meta, segments: list[Segment]) -> dict[str, int]:
    """Bytes by part: particles (state, weights, one copy), noise of a chunk, history."""
    widest = max(s.num_particles for s in segments) * smc.num_runs
    particles = widest * (2 * meta.carried_bytes + 16 + meta.chunk * meta.noise_bytes)
    kept = sum((s.last - s.first) * s.num_particles for s in segments) * smc.num_runs
    history = 2 * kept * (meta.state_bytes + 8)  # joined from blocks: two copies for a moment
    store = smc.algorithm.store
    chosen = history if store == "paths" or (store == "auto" and history // 2 <= _AUTO_BYTES) else 0
    return {
        "particles": int(particles),
        "paths": int(history // 2),
        "total": int(particles + chosen),
    }


def _nan_leaves(record: Any) -> list[str]:
    names = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(record):
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and bool(jnp.isnan(leaf).any()):
            names.append(jax.tree_util.keystr(path, simple=True, separator="/") or "state")
    return names


def _count(values: np.ndarray) -> dict[str, int]:
    return {
        "NaN": int(np.isnan(values).sum()),
        "+inf": int((values == np.inf).sum()),
        "-inf": int((values == -np.inf).sum()),
    }


def positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"smcscale: `{name}` must be a positive whole number, got {value!r}.")
    return int(value)


def divisible(num_particles: int, num_islands: int) -> None:
    if num_particles % num_islands:
        raise ValueError(
            f"smcscale: {num_particles} particles do not divide into {num_islands} islands.\n"
            "  try: `num_particles` a multiple of `num_islands`."
        )
