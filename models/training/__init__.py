"""Training runs: their configuration and presets, the steps, the log."""
