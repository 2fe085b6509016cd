"""HTTP parts that the OpenAI API and the workers share: request guard, errors, streaming, server."""
