"""The decoder networks: pure torch modules from scaled latents to pictures."""
