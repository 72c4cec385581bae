"""A language model writing step by step, as a program."""
