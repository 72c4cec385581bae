"""Bugs planted on purpose, and the tests that must catch each.

`make mutants` applies every patch to a copy of the project, runs the named tests on it and reports
survivors; `make test` does one for each room. A new kernel adds one line here.

    python tests/support/mutations.py [--one-per-room] [NAME ...]
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Mutation(NamedTuple):
    """A bug: in `file`, `old` becomes `new`; `tests` (pytest arguments) must then fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


_EVIDENCE = "tests/engine/test_evidence.py -k"

MUTATIONS = [
    Mutation(
        "weights dropped when a step does not resample",
        "smcscale/engine/step.py",
        "lw = resampled.log_weights + mutated.log_weights",
        "lw = 0 * resampled.log_weights + mutated.log_weights",
        f"{_EVIDENCE} 'walk-systematic-ess-none'",
    ),
    Mutation(
        "quotient of weights and resampling law dropped",
        "smcscale/engine/step.py",
        "    if keeps_quotient:\n",
        "    if False:\n",
        f"{_EVIDENCE} 'walk-systematic-always-floor'",
    ),
    Mutation(
        "evidence without the 1/N",
        "smcscale/engine/step.py",
        "jnp.log(total / num_particles)",
        "jnp.log(total)",
        f"{_EVIDENCE} 'walk-systematic-ess-none'",
    ),
    Mutation(
        "resampling threshold over all runs together",
        "smcscale/engine/step.py",
        "return jax.vmap(scheme.trigger, in_axes=(0, None))(grouped, time)",
        "return jnp.broadcast_to(scheme.trigger(grouped.reshape(-1), time), islands)",
        "tests/engine/test_laws.py -k how_many_runs",
    ),
    Mutation(
        "unweighted averages of weighted particles",
        "smcscale/engine/step.py",
        'jnp.einsum("rkn...,rn->rk...", powers, scaled)',
        "jnp.mean(powers, axis=2) * total[:, None]",
        f"{_EVIDENCE} 'walk-systematic-ess-none'",
    ),
    Mutation(
        "a dead run counted as alive",
        "smcscale/engine/step.py",
        "increment = jnp.where(dead, -jnp.inf, largest",
        "increment = jnp.where(dead, 0.0, largest",
        "tests/program/test_bad_input.py -k dead",
    ),
    Mutation(
        "states not moved to their ancestors",
        "smcscale/engine/gather.py",
        'moved = jnp.take(rows, flat, axis=0, mode="clip")',
        "moved = rows",
        f"{_EVIDENCE} 'walk-systematic-always-none'",
    ),
    Mutation(
        "paths traced without ancestors",
        "smcscale/engine/store.py",
        "return jnp.take_along_axis(parents, index, axis=1), values",
        "return index, values",
        f"{_EVIDENCE} 'walk-systematic-always-none'",
    ),
    Mutation(
        "one key for all steps",
        "smcscale/keys.py",
        "return jax.random.fold_in(jax.random.fold_in(run_key, _MOVE), time)",
        "return jax.random.fold_in(run_key, _MOVE)",
        f"{_EVIDENCE} 'walk-systematic-never-none-bootstrap'",
    ),
    Mutation(
        "all runs share their randomness",
        "smcscale/keys.py",
        "jax.vmap(lambda r: jax.random.fold_in(key, r))(jnp.arange(num_runs))",
        "jax.vmap(lambda r: jax.random.fold_in(key, 0 * r))(jnp.arange(num_runs))",
        "tests/program/test_families.py",
    ),
    Mutation(
        "a guided initial state without its ratio",
        "smcscale/program/lower.py",
        'increment += log_density({n: sites[n] for n in given}, "latent")',
        "increment += 0.0",
        f"{_EVIDENCE} 'guided and always'",
    ),
    Mutation(
        "a guided step without the prior's density",
        "smcscale/program/lower.py",
        'return Weighted(state, log_density(seen.sites, "latent") - log_q)',
        "return Weighted(state, -log_q)",
        f"{_EVIDENCE} 'guided and always'",
    ),
    Mutation(
        "all particles share their noise",
        "smcscale/noise.py",
        'shape = (num_particles, *eqn.params["shape"])',
        'shape = (1, *eqn.params["shape"])',
        "tests/program/test_families.py",
    ),
    Mutation(
        "one vote for each run",
        "smcscale/result.py",
        "return np.asarray(result.log_evidence, np.float64)\n\n\ndef _comparable",
        "return np.zeros(result.num_runs)\n\n\ndef _comparable",
        "tests/results",
    ),
    Mutation(
        "NaN ESS read as enough",
        "kernels/triggers.py",
        "return ~(ess(log_weights) >= self.fraction * log_weights.size)",
        "return ess(log_weights) < self.fraction * log_weights.size",
        "tests/kernels/test_triggers.py",
    ),
    Mutation(
        "ESS without the square of the weights",
        "smcscale/weights.py",
        "squares = jnp.sum(scaled * scaled)",
        "squares = jnp.sum(scaled)",
        "tests/kernels/test_weights.py",
    ),
    Mutation(
        "stratified resampling with one uniform for all strata",
        "kernels/resampling/schemes.py",
        "points = uniform_parts(key, (n,))",
        "points = jnp.broadcast_to(uniform_parts(key, (1,)), (n,))",
        "tests/kernels/test_resampling.py -k 'variance_of_a_sum'",
    ),
    Mutation(
        "residual resampling without its sure copies",
        "kernels/resampling/schemes.py",
        "return ancestors_at(sure + drawn, n)",
        "return ancestors_at(drawn, n)",
        "tests/kernels/test_resampling.py -k 'offspring and residual'",
    ),
    Mutation(
        "the soft tilt forgets the dead",
        "kernels/tilts.py",
        "number = jnp.maximum(jnp.sum(alive), 1)",
        "number = log_weights.size",
        "tests/kernels/test_tilts.py -k soft_mixes",
    ),
    Mutation(
        "finished texts weighed again",
        "models/reasoning/program.py",
        "weight = jnp.where(over, jnp.zeros_like(weight), weight)",
        "weight = jnp.where(over, weight, weight)",
        "tests/models/reasoning/test_program.py -k 'evidence_and_law and odds and absorb'",
    ),
    Mutation(
        "a row beyond the end of a block counts",
        "smcscale/engine/compiled.py",
        "jnp.minimum(stop - first - done, chunk)",
        "chunk",
        "tests/engine/test_laws.py -k beginning_of_a_longer",
    ),
    Mutation(
        "what a host model weighs forgotten",
        "smcscale/engine/host.py",
        "by_run(log_weights), sums)",
        "0 * by_run(log_weights), sums)",
        "tests/engine/test_host.py -k evidence",
    ),
    Mutation(
        "a server's stop string taken for the end of the text",
        "models/reasoning/remote.py",
        'if reason == "stop" and met == self.delimiter:',
        "if False:",
        "tests/models/reasoning/test_remote.py -k 'law and True-True'",
    ),
    Mutation(
        "allowed tokens drawn without their weight",
        "models/reasoning/constraints.py",
        'numpyro.factor("constraint", after.log_weight)',
        'numpyro.factor("constraint", jnp.maximum(after.log_weight, 0.0))',
        "tests/models/reasoning/test_constraints.py -k evidence_and_law",
    ),
    Mutation(
        "the temperature of a potential ignored",
        "models/reasoning/potentials.py",
        "return self.weigh(previous, score) / self.temperature",
        "return self.weigh(previous, score)",
        "tests/models/reasoning/test_potentials.py -k multiply",
    ),
    Mutation(
        "steering ends with the running rule",
        "models/diffusion/potentials.py",
        "log_potential = jnp.where(last, difference(known, strength), rule(known, strength))",
        "log_potential = rule(known, strength)",
        "tests/models/diffusion/test_potentials.py",
    ),
    Mutation(
        "the first noise is not weighed",
        "models/diffusion/program.py",
        'numpyro.factor("first_potential", log_potential)',
        'numpyro.factor("first_potential", 0 * log_potential)',
        "tests/models/diffusion/test_program.py -k variance",
    ),
    Mutation(
        "a guided step without its ratio",
        "models/diffusion/twisted.py",
        "return jnp.where(noisy, jnp.sum(other**2 - one**2) / 2, 0.0)",
        "return jnp.where(noisy, 0 * jnp.sum(other**2 - one**2) / 2, 0.0)",
        "tests/models/diffusion/test_twisted.py -k ratio_of_densities",
    ),
    Mutation(
        "the divergence of the drift left out as a constant",
        "models/diffusion/correctors.py",
        "log_weight = -(total - 1) * growth * x.size",
        "log_weight = 0 * growth",
        "tests/models/diffusion/test_correctors.py -k 'walk and annealed'",
    ),
    Mutation(
        "a point prediction forgets its variance",
        "models/diffusion/samplers.py",
        "variance = variance + factor**2 * prediction.variance",
        "variance = variance + 0 * factor**2 * prediction.variance",
        "tests/models/diffusion/test_samplers.py",
    ),
    Mutation(
        "the last conjugate potential divided out again",
        "models/diffusion/linear.py",
        "staying = problem.active(low) & ~last",
        "staying = problem.active(level) & ~last",
        "tests/models/diffusion/test_linear.py -k grid",
    ),
    Mutation(
        "guidance without its weight",
        "models/diffusion/guidance.py",
        "return Guided(proposal, target if self.corrected else proposal)",
        "return Guided(proposal, proposal)",
        "tests/models/diffusion/test_masked.py -k 'evidence or law or guidance'",
    ),
    Mutation(
        "tempering that ends below full strength",
        "models/diffusion/potentials.py",
        "return jnp.asarray(self.strength) * jnp.where(last, 1, self.tempering(made))",
        "return jnp.asarray(self.strength) * self.tempering(made)",
        "tests/models/diffusion/test_potentials.py -k product_of_all",
    ),
    Mutation(
        "the data read as if they were noisy",
        "models/diffusion/potentials.py",
        "return noisy() if plain else lax.cond(last, lambda: self.reward(x), noisy)",
        "return noisy()",
        "tests/models/diffusion/test_potentials.py -k product_of_all",
    ),
    Mutation(
        "powers that change without the densities",
        "models/diffusion/correctors.py",
        "log_weight += (denoiser.at(low) - powers) @ path.log_densities(x, high)",
        "log_weight += 0 * (denoiser.at(low) - powers) @ path.log_densities(x, high)",
        "tests/models/diffusion/test_correctors.py -k heated",
    ),
    Mutation(
        "noise raised to a power without its normalizer",
        "models/diffusion/correctors.py",
        "return Proposed(law, Constant(log_normalizer))",
        "return Proposed(law, Constant(0 * log_normalizer))",
        "tests/models/diffusion/test_correctors.py -k 'walk and annealed'",
    ),
    Mutation(
        "a conjugate start without its weight",
        "models/diffusion/linear.py",
        "return Proposed(law, Constant(weight))",
        "return Proposed(law, Constant(0 * weight))",
        "tests/models/diffusion/test_linear.py -k grid",
    ),
    Mutation(
        "the first noise of a host model is not weighed",
        "models/diffusion/host_program.py",
        "seen, log_weights = self.scored(for_first, previous, opening)",
        "seen, _ = self.scored(for_first, previous, opening)",
        "tests/models/diffusion/test_host_program.py -k evidence",
    ),
    Mutation(
        "a corrected token chain without its ratio",
        "models/diffusion/ctmc.py",
        'numpyro.factor("weight", jnp.sum(at(table) - at(log_q)))',
        'numpyro.factor("weight", 0 * jnp.sum(at(table) - at(log_q)))',
        "tests/models/diffusion/test_ctmc.py -k one_token_a_row_has",
    ),
    Mutation(
        "one vote for each schedule's filter",
        "models/diffusion/blocks.py",
        "np.where(np.isneginf(found), -np.inf, shares + float(evidence))",
        "np.where(np.isneginf(found), -np.inf, shares)",
        "tests/models/diffusion/test_blocks.py -k pooled",
    ),
    Mutation(
        "clusters keep one member and forget the others",
        "models/diffusion/autoregressive.py",
        "        if self.corrected:\n            mass",
        "        if wanted is None:\n            mass",
        "tests/models/diffusion/test_autoregressive.py -k clusters_with_their_weights",
    ),
    Mutation(
        "a kept path that does not weigh what its new beginning does",
        "smcscale/engine/conditional.py",
        "keys.ancestor(step_key), lw + rest)",
        "keys.ancestor(step_key), rest)",
        "tests/models/reasoning/test_gibbs.py -k 'leaves_the_target and ess'",
    ),
    Mutation(
        "ancestors of a kept path drawn by its next row alone",
        "smcscale/engine/conditional.py",
        "jax.lax.fori_loop(time, bound.num_steps, one_row, start)",
        "jax.lax.fori_loop(time, jnp.minimum(time + 1, bound.num_steps), one_row, start)",
        "tests/models/reasoning/test_gibbs.py -k 'leaves_the_target and ancestors'",
    ),
    Mutation(
        "old scores for a kept text with another beginning",
        "smcscale/engine/conditional.py",
        "gain = jnp.where(density == -jnp.inf, -jnp.inf, weights + density)",
        "gain = density",
        "tests/models/reasoning/test_gibbs.py -k 'leaves_the_target and ancestors'",
    ),
    Mutation(
        "chains swap by the wrong sign",
        "models/reasoning/gibbs.py",
        "ratio += sign * float",
        "ratio -= sign * float",
        "tests/models/reasoning/test_gibbs.py -k swap",
    ),
    Mutation(
        "a kept path of a host model without its increments",
        "smcscale/engine/conditional_host.py",
        "else kept.increments[time + 1]",
        "else 0.0",
        "tests/engine/test_conditional_host.py -k weights_are",
    ),
    Mutation(
        "a kept path of a host model that may be resampled away",
        "smcscale/engine/conditional_host.py",
        "        if draw is None:\n",
        "        if True:\n",
        "tests/engine/test_conditional_host.py -k 'leaves_the_target and multinomial'",
    ),
]


def survives(mutation: Mutation) -> bool:
    """Whether the named tests pass with the bug in place."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        package = copy / "site" / "smcscale"
        shutil.copytree(ROOT / "smcscale", package)
        shutil.copytree(ROOT / "kernels", package / "kernels")
        shutil.copytree(ROOT / "models", package / "models")
        shutil.copytree(ROOT / "tests", copy / "tests")
        shutil.copy(ROOT / "pyproject.toml", copy)
        top, _, rest = mutation.file.partition("/")
        target = package / (rest if top == "smcscale" else mutation.file)
        text = target.read_text()
        if text.count(mutation.old) != 1:
            raise SystemExit(f"mutant '{mutation.name}' does not apply once to {mutation.file}")
        target.write_text(text.replace(mutation.old, mutation.new))
        environment = dict(os.environ, PYTHONPATH=str(copy / "site"))
        command = f"{sys.executable} -m pytest -x -q -p no:cacheprovider {mutation.tests}"
        done = subprocess.run(
            command,
            check=False,
            shell=True,
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode not in (0, 1):
            raise SystemExit(f"mutant '{mutation.name}': no test ran\n{done.stdout[-2000:]}")
        return done.returncode == 0


def main() -> None:
    """Run the mutants that are asked for and say which survive."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of mutants' names; all by default")
    parser.add_argument("--one-per-room", action="store_true", help="the first of each folder")
    options = parser.parse_args()
    chosen, rooms = [], set()
    for mutation in MUTATIONS:
        room = str(Path(mutation.file).parent)
        if options.one_per_room and room in rooms:
            continue
        if options.names and not any(n in mutation.name for n in options.names):
            continue
        rooms.add(room)
        chosen.append(mutation)
    alive = []
    for mutation in chosen:
        found = survives(mutation)
        print(f"{'SURVIVES' if found else 'caught  '}  {mutation.name}", flush=True)
        alive += [mutation.name] * found
    print(f"{len(chosen) - len(alive)} of {len(chosen)} mutants caught")
    if alive:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
