"""Reads optimised HLO: text, groups, loops, collectives and products; `reader.py` puts them together."""
