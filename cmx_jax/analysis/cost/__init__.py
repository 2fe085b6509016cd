"""What an operator costs on a machine: `constants.py` has every constant and its source, `measured.py` the
operator-level figures that they are held to, `operators.py` the time of one operator, `overlap.py` of many
that share a machine, `imbalance.py` how much more than the mean the busiest rank gets."""
