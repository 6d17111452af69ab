"""Serving a model over HTTP: OpenAI-compatible routes, routing, metrics, and the live page."""
