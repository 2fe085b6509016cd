"""Predicts the time of a step on a machine from the program that would run there."""
