"""Records that all readers of programs make: collectives, products, scopes, places on the machine."""
