"""amortlm: make a language model sample from posteriors that it defines but cannot sample."""
