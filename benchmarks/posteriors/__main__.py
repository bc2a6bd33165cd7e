"""Every method against the same truth: posteriors that can be enumerated, on the embedded model.

    python -m benchmarks.posteriors --output results/posteriors
    python -m benchmarks.posteriors --methods 'verifier *' --seeds 1 --set updates=50

A method is a target and how it is sampled: 'two-mode sir'. Methods that train nothing have an exact (or simulated) law,
and one seed.
"""

from amortlm.lab import command

from .experiment import EXPERIMENT

if __name__ == "__main__":
    command.main(EXPERIMENT, program="python -m benchmarks.posteriors")
