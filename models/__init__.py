"""Reference models, objectives, data, trainer and sampler. Run from a checkout; not installed with the package."""
