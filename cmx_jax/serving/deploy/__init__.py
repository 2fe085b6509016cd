"""From the name of a model to instances that run: weights, placement on the supernode, `LLM`, the demo."""
