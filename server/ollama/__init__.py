"""Ollama's API over the chat and the completions: its fields, and its replies."""
