"""Training clips: where they come from, how they become batches, and how they are written."""
