"""Sequential Monte Carlo for programs that move a state through time and score it."""
