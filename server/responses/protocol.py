"""The body of POST /v1/responses, and the chat that it stands for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from jaxserve.server.protocol import MAX_LOGPROBS, MAX_MESSAGES, ChatRequest, Fields, LogitBias, Text

Messages = list[dict[str, str]]
"""Messages as chats have them: role and content."""


def _join_input_parts(content: object) -> object:
    """A message's content as one string, from a string or a list of input_text and output_text parts."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in ("input_text", "output_text", "text") or not isinstance(part.get("text"), str):
            text = 'parts must be {"type": "input_text", "text": "..."}; a part of type {kind} is not supported'
            raise PydanticCustomError("content", text, {"kind": ascii(kind)})
        texts.append(part["text"])
    return "\n".join(texts)


def _parse_input(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class InputMessage(Fields):
    """One message: given as input, or an item of an earlier response's output."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_join_input_parts)]
    id: Text | None = None
    status: Text | None = None
    phase: Text | None = None


class TextFormat(Fields):
    """Only plain text can be asked for."""

    type: Literal["text"]


class TextOptions(Fields):
    """What the output is to be like."""

    format: TextFormat | None = None


class ResponsesStreamOptions(Fields):
    """What a stream carries besides the text."""

    include_obfuscation: bool = False  # OpenAI's padding against traffic analysis; not added here


class ResponsesRequest(Fields):
    """The body of POST /v1/responses."""

    model: Text | None = None
    input: Annotated[list[InputMessage], BeforeValidator(_parse_input), Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: Text | None = None
    previous_response_id: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    stream: bool = False
    stream_options: ResponsesStreamOptions | None = None
    background: bool = False
    store: bool = True
    metadata: dict[Text, Text] | None = Field(None, max_length=16)
    user: Text | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    include: list[Literal["message.output_text.logprobs"]] | None = None
    text: TextOptions | None = None
    truncation: Literal["disabled"] = "disabled"
    tool_choice: Literal["auto", "none"] = "auto"
    # vLLM's additions
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    logit_bias: LogitBias | None = None
    cache_salt: Text | None = Field(None, max_length=256)
    priority: int = Field(0, ge=-(2**31), lt=2**31)

    @property
    def wants_logprobs(self) -> bool:
        return self.top_logprobs is not None or bool(self.include)

    def messages(self) -> Messages:
        """The new messages."""
        return [{"role": m.role, "content": m.content} for m in self.input]

    def as_chat(self, before: Messages) -> ChatRequest:
        """The same as a chat.

        Args:
            before: the conversation that it goes on with.
        """
        system = [{"role": "system", "content": self.instructions}] if self.instructions is not None else []
        names = ("stream", "temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "cache_salt", "priority")
        fields: dict[str, Any] = {name: getattr(self, name) for name in names} | {"max_completion_tokens": self.max_output_tokens}
        if self.logit_bias is not None:
            fields["logit_bias"] = {str(i): bias for i, bias in self.logit_bias.items()}
        if self.wants_logprobs:
            fields |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        return ChatRequest.model_validate(fields | {"messages": [*system, *before, *self.messages()]})
