"""From noise to samples: solvers, predictions with guidance, and whole clips."""
