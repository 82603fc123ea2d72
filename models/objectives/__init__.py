"""What models learn: losses, and what a prediction says about data and noise."""
