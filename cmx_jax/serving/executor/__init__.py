"""Runs an instance's programs on its devices, over its weights and KV cache."""
