"""Looks at the system instead of running it: traces, cost, plans, simulation, comparison, evaluation."""
