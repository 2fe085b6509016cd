"""Traces a model's steps at full size, without weights: collectives, products and memory of one rank."""
