"""Sampling from the exact posterior with a policy as proposal: Metropolis-Hastings and sequential Monte Carlo."""
