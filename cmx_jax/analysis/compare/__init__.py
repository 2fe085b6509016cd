"""Layouts of a model side by side: what a step moves, computes and holds under each."""
