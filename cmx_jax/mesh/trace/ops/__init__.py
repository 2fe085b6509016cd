"""Records that all readers of programs return: collectives, products, scopes, places on the machine."""
