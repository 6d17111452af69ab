"""Messages to prompts and answers to messages: chat templates, reasoning, tool calls."""
