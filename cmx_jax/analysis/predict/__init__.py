"""Predicts a step's time on a machine, from the program that would run there."""
