"""The models that denoise."""
