"""A module for each command of `amortlm`, with its function `run`."""
