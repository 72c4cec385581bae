"""What the user wrote: a NumPyro program with a time loop, taken over and lowered to Feynman-Kac.

| module | idea |
|---|---|
| `scan` | run a program up to, inside, or after its loop, and record the sites |
| `missing` | which elements of an observed site are scored |
| `refusals` | what a program may not contain, with the remedy |
| `state` | what one particle carries; sums over its sites |
| `guide` | a second program as proposal |
| `tail` | the sites after the loop |
| `lower` | program (+ guide or proposal) -> `FeynmanKac` |
| `forecast` | the program run on beyond the data |
"""
