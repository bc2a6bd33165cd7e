"""The laboratory: experiments, baselines, metrics, tasks. Nothing in the library imports it but the command line."""
