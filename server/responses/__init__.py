"""OpenAI's Responses API over the chat: its fields, its replies, and those that are kept for later."""
