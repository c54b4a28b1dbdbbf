"""The bodies of Anthropic's Messages API, and the chat that each stands for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from jaxserve.server.protocol import MAX_MESSAGES, MAX_WORDS, ChatRequest, Fields, Text, join_parts


class AnthropicMessage(Fields):
    """One message."""

    role: Literal["user", "assistant"]
    content: Annotated[Text, BeforeValidator(join_parts)]


class Thinking(Fields):
    """Thinking cannot be asked for, but it can be turned off."""

    type: Literal["disabled"]


class CountRequest(Fields):
    """The body of POST /v1/messages/count_tokens."""

    model: Text
    messages: list[AnthropicMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: Annotated[Text, BeforeValidator(join_parts)] | None = None
    thinking: Thinking | None = None

    def as_chat(self) -> ChatRequest:
        """The same as a chat. One that ends with the assistant's words asks for their continuation."""
        messages = [{"role": m.role, "content": m.content} for m in self.messages]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        goes_on = self.messages[-1].role == "assistant"
        return ChatRequest.model_validate({"messages": messages, "continue_final_message": goes_on, **self.sampling()})

    def sampling(self) -> dict[str, Any]:
        """The other fields of the chat."""
        return {}


class MessagesRequest(CountRequest):
    """The body of POST /v1/messages."""

    max_tokens: int = Field(ge=1)
    stream: bool = False
    stop_sequences: list[Text] | None = Field(None, max_length=MAX_WORDS)
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = None
    top_k: int | None = None

    def sampling(self) -> dict[str, Any]:
        names = ("max_tokens", "stream", "temperature", "top_p", "top_k")
        return {name: getattr(self, name) for name in names} | {"stop": self.stop_sequences}
