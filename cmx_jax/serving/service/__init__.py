"""Serves an event loop with one engine: calls run between its steps, and answers grow chunk by chunk."""
