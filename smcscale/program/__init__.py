"""What the user wrote: a NumPyro program with a time loop, taken over and lowered to Feynman-Kac.

| module | idea |
|---|---|
| `scan` | run a program up to, inside, or after its loop, and record the sites |
| `lower` | program (+ guide or proposal) -> `FeynmanKac` |
| `forecast` | the program run on beyond the data |
"""
