"""Requests in, tokens out: page pools, requests, instances, the serving loop, the offline `LLM`."""
