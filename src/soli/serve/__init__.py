"""Serving a model over HTTP, and the page that shows its experts play."""
