"""The exact posterior with a policy as proposal: SIR, sequential Monte Carlo and Metropolis-Hastings."""
