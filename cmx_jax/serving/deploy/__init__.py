"""Starts instances of a model by its name: weights, placement on the supernode, `LLM`, the demo."""
