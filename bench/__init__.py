"""What the kernels are worth on this machine: ``pytest bench/ --benchmark-only``, run from a checkout."""
