"""Lets the threads of a server use one engine: calls between steps, answers as they grow."""
