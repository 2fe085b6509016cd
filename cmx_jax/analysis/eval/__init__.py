"""What a model can do: sixteen skills as questions with known answers."""
