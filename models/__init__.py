"""Programs worth shipping: state space, reasoning, diffusion."""
