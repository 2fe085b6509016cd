"""What a program moves and computes, read from its jaxpr, its StableHLO or its optimised HLO."""
