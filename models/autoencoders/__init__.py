"""Clips to latents and back."""
