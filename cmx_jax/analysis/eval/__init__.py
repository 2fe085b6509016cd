"""Evaluation of models: sixteen skills as questions with known answers, held-out text, public benchmarks."""
