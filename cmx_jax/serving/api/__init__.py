"""OpenAI's HTTP API over a `serving.service.frontend.Frontend`: an engine here, or a router with workers."""
