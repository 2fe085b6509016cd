"""The serving loop: steps of all instances, and KV pages on their way between them."""
