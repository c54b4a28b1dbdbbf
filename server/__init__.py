"""The OpenAI-compatible HTTP server: wire formats, routes, streaming. The only place that knows status codes."""
