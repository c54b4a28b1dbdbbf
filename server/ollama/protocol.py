"""The bodies of Ollama's API, and the chat or completion that each stands for."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from jaxserve.server.protocol import (
    MAX_MESSAGES,
    MAX_WORDS,
    ChatRequest,
    CompletionRequest,
    Fields,
    Text,
    as_list,
)


class Options(Fields):
    """How to sample. What says only how a machine is to be used is accepted and means nothing here."""

    num_predict: int | None = Field(None, ge=-2)
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: Annotated[list[Text], BeforeValidator(as_list), Field(max_length=MAX_WORDS)] | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    num_ctx: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    num_thread: int | None = None
    main_gpu: int | None = None
    use_mmap: bool | None = None
    numa: bool | None = None

    def sampling(self) -> dict[str, Any]:
        """The fields of a chat or completion."""
        names = ("temperature", "top_k", "top_p", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty")
        fields = {name: getattr(self, name) for name in names} | {"repetition_penalty": self.repeat_penalty}
        if self.num_predict is not None and self.num_predict >= 0:  # -1 and -2: as many as fit
            fields["max_tokens"] = self.num_predict
        return fields


class OllamaFields(Fields):
    """What both bodies have."""

    model: Text
    stream: bool = True
    options: Options = Field(default_factory=lambda: Options.model_validate({}))
    think: Literal[False] | None = None
    keep_alive: Text | int | float | None = None  # the model stays loaded anyway


class OllamaMessage(Fields):
    """One message."""

    role: Literal["system", "user", "assistant"]
    content: Text


class OllamaChatRequest(OllamaFields):
    """The body of POST /api/chat."""

    messages: list[OllamaMessage] = Field(min_length=1, max_length=MAX_MESSAGES)

    def as_chat(self) -> ChatRequest:
        messages = [{"role": m.role, "content": m.content} for m in self.messages]
        goes_on = self.messages[-1].role == "assistant"
        chat = {"messages": messages, "continue_final_message": goes_on, "stream": self.stream}
        return ChatRequest.model_validate(chat | self.options.sampling())


class RawRequest(CompletionRequest):
    """A completion that is as long as fits, if it is not told otherwise."""

    default_max_tokens: ClassVar[int | None] = None


class OllamaGenerateRequest(OllamaFields):
    """The body of POST /api/generate."""

    prompt: Text
    system: Text | None = None
    raw: bool = False

    def as_request(self) -> ChatRequest | CompletionRequest:
        """A completion if the prompt is raw, else a chat of one message."""
        fields = {"stream": self.stream} | self.options.sampling()
        if self.raw:
            return RawRequest.model_validate(fields | {"prompt": self.prompt})
        messages = [{"role": "system", "content": self.system}] if self.system else []
        return ChatRequest.model_validate(fields | {"messages": [*messages, {"role": "user", "content": self.prompt}]})


class ShowRequest(Fields):
    """The body of POST /api/show."""

    model: Text
    verbose: bool = False
