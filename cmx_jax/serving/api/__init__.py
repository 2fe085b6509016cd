"""OpenAI's HTTP API over `serving.service.Service`."""
