"""HTTP parts shared by the OpenAI API and the workers: keys and body limit, errors, streaming, server."""
