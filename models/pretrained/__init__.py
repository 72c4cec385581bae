"""Small checkpoints, each with a card."""
