"""Traces a model's steps at full size, without weights: collectives, products, memory of a rank."""
