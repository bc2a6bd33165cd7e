"""How far a sampler is from the posterior: exactly where that is possible, by importance weights elsewhere."""
