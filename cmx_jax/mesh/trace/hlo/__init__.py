"""Reads optimised HLO."""
