"""The particle engine: one step, many particles, many runs.

| module | idea |
|---|---|
| `mutate` | one particle's transition and potential, run for all particles of all runs |
| `step` | one step: look ahead, trigger, tilt, resample, mutate, weigh, account for evidence |
| `gather` | moving states after resampling |
| `host` | the step of a model that runs Python, parted at its transition |
| `filter` | `ParticleFilter`: start, the scan over time in blocks, the online form |
| `store` | what is kept of the past: last, ancestry, paths |
"""
