"""OpenAI's Responses API: its bodies become chat requests, the chunks of a chat its items and events.

Nothing is stored: a conversation is sent whole, and what refers to a stored one is rejected by name.
"""
