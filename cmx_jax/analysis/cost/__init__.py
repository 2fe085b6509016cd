"""Cost of an operator on a machine: `constants.py` has every constant and its source, `measured.py` the
published operator-level figures to which constants are fitted, `operator_times.py` the time of one operator,
`overlap.py` the time of many operators that share a machine, `imbalance.py` the load of the busiest rank
relative to the mean."""
