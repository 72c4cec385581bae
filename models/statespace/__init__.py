"""State-space programs, their exact answers and example series."""
