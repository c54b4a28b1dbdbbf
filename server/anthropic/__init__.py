"""Anthropic's Messages API over the chat: its fields, and its replies."""
