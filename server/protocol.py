"""The requests as clients write them: OpenAI's fields, and vLLM's additions to them. Responses are plain dicts (reply.py).

A field that is not supported is refused by its name, unless it is null, empty, or says what happens anyway.
"""

from __future__ import annotations

import difflib
from contextlib import suppress
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

MAX_PROMPTS = 1024
MAX_N = 128  # OpenAI's limit
MAX_LOGPROBS = 20  # OpenAI's limit
MAX_WORDS = 64  # stop strings, stop ids, bad words
MAX_WORD = 1024  # characters of one
MAX_BIASES = 1024
MAX_MESSAGES = 4096
MAX_TEMPLATE_KWARGS = 32
MAX_ALLOWED_IDS = 2**19  # the largest vocabularies, twice

# Notes for the caller's own books: they cannot change the answer.
_HARMLESS = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
}  # fmt: skip
# Unsupported fields may carry the value that turns them off.
_OFF = {
    "best_of": 1, "suffix": "", "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"],
}  # fmt: skip


def _check_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise PydanticCustomError("text", "must be valid Unicode; it has half of a surrogate pair") from e
    return text


def as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def join_parts(content: object) -> object:
    """A message's content as one string, from a string or a list of text parts."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise PydanticCustomError(
                "content",
                'parts must be {"type": "text", "text": "..."}; a part of type {kind} is not supported',
                {"kind": ascii(kind)},
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _parse_prompt(prompt: object) -> list[str] | list[list[int]]:
    """Any of the four forms of a prompt, as a list of texts or a list of token id lists."""
    prompts = [prompt] if isinstance(prompt, str) or _is_token_ids(prompt) else prompt
    if isinstance(prompts, list) and prompts:
        if len(prompts) > MAX_PROMPTS:
            raise PydanticCustomError(
                "prompt", "must hold at most {most} prompts; got {got}", {"most": MAX_PROMPTS, "got": len(prompts)}
            )
        if all(isinstance(p, str) for p in prompts):
            return [_check_text(p) for p in prompts]
        if all(_is_token_ids(p) for p in prompts):
            return prompts
    raise PydanticCustomError("prompt", "must be a string, a list of strings, a list of token ids or a list of such lists")


def _parse_logit_bias(value: object) -> dict[int, float]:
    """{token id as a string, as JSON has it: bias}."""
    if isinstance(value, dict) and len(value) <= MAX_BIASES:
        with suppress(TypeError, ValueError):
            biases = {int(token_id): float(bias) for token_id, bias in value.items()}
            if all(-100 <= bias <= 100 for bias in biases.values()):
                return biases
    text = "must map token ids to numbers between -100 and 100, {most} of them at most"
    raise PydanticCustomError("logit_bias", text, {"most": MAX_BIASES})


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token_id) is int for token_id in value)


Text = Annotated[str, AfterValidator(_check_text)]
Word = Annotated[Text, Field(max_length=MAX_WORD)]
LogitBias = Annotated[dict[int, float], PlainValidator(_parse_logit_bias, json_schema_input_type=dict[str, float])]
Prompts = Annotated[
    list[str] | list[list[int]],
    PlainValidator(_parse_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]


class Fields(BaseModel):
    """A JSON object whose unknown fields are refused by name; null counts as not given."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in cls.model_fields:
                if value is not None:
                    kept[name] = value
            elif not (value in (None, [], {}) or name in _HARMLESS or (name in _OFF and value == _OFF[name])):
                raise _not_supported(name, list(cls.model_fields))
        return kept


def _not_supported(name: str, known: list[str]) -> PydanticCustomError:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else "Leave it out."
    return PydanticCustomError(
        "unsupported", "{text}", {"param": ascii(name)[1:-1], "text": f"{name!a} is not supported by this server. {hint}"}
    )


class StreamOptions(Fields):
    """What a stream carries besides the text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False  # OpenAI's padding against traffic analysis; not added here


class SamplingFields(Fields):
    """The fields that both endpoints share."""

    default_max_tokens: ClassVar[int | None] = None

    model: Text | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MAX_N)
    use_beam_search: bool = False
    length_penalty: float | None = None
    early_stopping: Literal[True, False, "never"] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: LogitBias | None = None
    allowed_token_ids: list[int] | None = Field(None, max_length=MAX_ALLOWED_IDS)
    bad_words: list[Word] | None = Field(None, max_length=MAX_WORDS)
    seed: int | None = None
    stop: Annotated[list[Word], BeforeValidator(as_list), Field(max_length=MAX_WORDS)] | None = None
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_WORDS)
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    return_token_ids: bool = False
    priority: int = Field(0, ge=-(2**31), lt=2**31)
    cache_salt: Text | None = Field(None, max_length=256)

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            text = "stream_options needs stream to be true"
            raise PydanticCustomError("stream_options", "{text}", {"param": "stream_options", "text": text})
        if self.prompt_logprobs is not None and self.stream:
            text = "prompt_logprobs cannot be streamed"
            raise PydanticCustomError("prompt_logprobs", "{text}", {"param": "prompt_logprobs", "text": text})
        return self

    @property
    def max_output_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many likeliest tokens to report, None for no logprobs."""
        raise NotImplementedError

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the tokens of the prompt."""
        return self.prompt_logprobs


class Message(Fields):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(join_parts)]
    name: Text | None = None

    def as_dict(self) -> dict[str, str]:
        """The message as chat templates know it, which have no word for `developer`."""
        message = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        return message | ({"name": self.name} if self.name else {})


class ChatFields(Fields):
    """How messages become a prompt."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[Word, Text | bool | int | float] | None = Field(None, max_length=MAX_TEMPLATE_KWARGS)

    @model_validator(mode="after")
    def _check_continuation(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            text = "continue_final_message goes on with the last message, and add_generation_prompt begins a new one; choose"
            raise PydanticCustomError("continue", "{text}", {"param": "continue_final_message", "text": text})
        return self

    @property
    def begins_message(self) -> bool:
        """Whether the prompt ends with the beginning of the assistant's message."""
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt


class ChatRequest(ChatFields, SamplingFields):
    """The body of POST /v1/chat/completions."""

    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError(
                "logprobs", "{text}", {"param": "top_logprobs", "text": "top_logprobs needs logprobs to be true"}
            )
        return self

    @property
    def max_output_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(SamplingFields):
    """The body of POST /v1/completions."""

    default_max_tokens: ClassVar[int | None] = 16  # OpenAI's

    prompt: Prompts
    best_of: int | None = Field(None, ge=1, le=MAX_N)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool = True

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        if not self.echo or self.logprobs is None:
            return self.prompt_logprobs
        return max(self.logprobs, self.prompt_logprobs or 0)
