"""Calculators of `cmx calc`: model switching (the paper's table 2) and elastic allocation (table 11)."""
