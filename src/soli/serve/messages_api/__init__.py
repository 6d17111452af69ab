"""Anthropic's Messages API: its bodies become chat requests, the chunks of a chat its messages and events."""
