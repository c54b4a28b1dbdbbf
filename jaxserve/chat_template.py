"""Chat messages to prompt ids, through the model's own Jinja template. Knows no HTTP and no request.

A message's text stays text: where it spells a control token such as <|im_end|>, that spelling is encoded as plain text.
"""

from __future__ import annotations

import inspect
import json
import re
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from jaxserve.errors import InvalidRequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEMPLATE_INPUTS = {"tools", "documents", "continue_final_message", "kwargs"}

# Put around control tokens in messages. No message can hold one: the number is drawn when the program starts.
_NONCE = secrets.token_hex(8)
_OPEN, _CLOSE = f"\U000f0000{_NONCE}(", f"\U000f0000{_NONCE})"


def encode(backend: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """Text to ids.

    Raises:
        InvalidRequestError: the text is no Unicode text (JSON can spell half a surrogate pair).
    """
    try:
        return backend.encode(text, add_special_tokens=add_special_tokens).ids
    except TypeError as error:
        raise InvalidRequestError("the text holds half of a surrogate pair, which is no character", param="prompt") from error


class ChatTemplate:
    """Renders chats with a model's template, and encodes them."""

    def __init__(self, backend: Tokenizer, renderer: PreTrainedTokenizerBase) -> None:
        """
        Args:
            backend: encodes the rendered text.
            renderer: brings the template and the special tokens that it may write; encodes nothing.
        """
        self.backend = backend
        self.renderer = renderer
        self.refused = set(inspect.signature(renderer.apply_chat_template).parameters) - _TEMPLATE_INPUTS
        self.refused |= renderer.special_tokens_map.keys()

    @property
    def source(self) -> str | None:
        """The template's Jinja text."""
        template = self.renderer.chat_template
        return template.get("default") if isinstance(template, dict) else template

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, kwargs: Mapping[str, Any]) -> str:
        """The prompt as text. See `Tokenizer.apply_chat_template`."""
        self._check(messages, kwargs)
        return self._render(messages, add_generation_prompt, kwargs)

    def encode(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, kwargs: Mapping[str, Any]) -> list[int]:
        """The prompt as ids. See `Tokenizer.apply_chat_template`."""
        self._check(messages, kwargs)
        if not any(self._find.search(text) or self._ends_open(text) for text in _strings([messages, kwargs])):
            return encode(self.backend, self._render(messages, add_generation_prompt, kwargs), add_special_tokens=False)
        marked = [self._mark(message, is_assistant=message["role"] == "assistant") for message in messages]
        return self._encode_marked(self._render(marked, add_generation_prompt, self._mark(kwargs, is_assistant=False)))

    def _check(self, messages: Sequence[Mapping[str, Any]], kwargs: Mapping[str, Any]) -> None:
        if not self.renderer.chat_template:
            raise InvalidRequestError("this model has no chat template: it takes prompts, no messages", param="messages")
        is_list = isinstance(messages, Sequence) and not isinstance(messages, str)
        if not is_list or not messages or not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages):
            raise InvalidRequestError("messages must be a non-empty list of objects with a role each", param="messages")
        if refused := sorted(self.refused & kwargs.keys()):
            raise InvalidRequestError(f"chat template options cannot set {', '.join(refused)}", param="chat_template_kwargs")

    def _render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, kwargs: Mapping[str, Any]) -> str:
        chat: list[Any] = list(messages)
        try:
            rendered = self.renderer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=add_generation_prompt, **kwargs
            )
        except Exception as error:  # a template is the model's own program: it may raise anything
            text = f"the model's chat template refuses these messages: {type(error).__name__}: {error}"
            raise InvalidRequestError(text, param="messages") from error
        assert isinstance(rendered, str), type(rendered)
        return rendered

    @cached_property
    def _special(self) -> frozenset[str]:
        """The control tokens."""
        return frozenset(t.content for t in self.backend.get_added_tokens_decoder().values() if t.special)

    @cached_property
    def _guarded(self) -> frozenset[str]:
        """Control tokens, and other added tokens that the template writes (<think>, <｜User｜>)."""
        added = (t.content for t in self.backend.get_added_tokens_decoder().values())
        return self._special | {token for token in added if token in (self.source or "") and not token.isspace()}

    @cached_property
    def _find(self) -> re.Pattern[str]:
        return _any_of(self._guarded)

    @cached_property
    def _find_special(self) -> re.Pattern[str]:
        return _any_of(self._special)

    @cached_property
    def _beginnings(self) -> frozenset[str]:
        return frozenset(token[:n] for token in self._guarded for n in range(1, len(token)))

    @cached_property
    def _longest_beginning(self) -> int:
        return max(map(len, self._beginnings), default=0)

    def _ends_open(self, text: str) -> bool:
        """Whether a text ends like the beginning of a control token: the template might write the rest after it."""
        return any(text[-n:] in self._beginnings for n in range(1, min(self._longest_beginning, len(text)) + 1))

    def _mark(self, value: Any, is_assistant: bool) -> Any:
        """Marks the control tokens in all strings of a JSON value, so that those of the template's own stand out.

        What is no control token (<think>) stays a token in the assistant's messages: the model writes it as text itself.
        """
        if isinstance(value, str):
            marked = (self._find_special if is_assistant else self._find).sub(lambda m: _OPEN + m[0] + _CLOSE, value)
            return marked + _CLOSE if self._ends_open(marked) else marked
        if isinstance(value, Mapping):
            return {key: self._mark(item, is_assistant) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._mark(item, is_assistant) for item in value]
        return value

    def _encode_marked(self, rendered: str) -> list[int]:
        """Encodes what the template made of marked messages: its own control tokens as tokens, the marked ones as text."""
        mark = f"{re.escape(_OPEN)}|{re.escape(_CLOSE)}"
        found = re.compile(f"{re.escape(_OPEN)}({self._find.pattern}){re.escape(_CLOSE)}|({self._find.pattern})|{mark}")
        # A mark alone is left where the template cut a marked token in two, or closes an open end.
        return self._twin.encode(found.sub(lambda m: m[1] or self._twin.names.get(m[2], ""), rendered))

    @cached_property
    def _twin(self) -> _Twin:
        return _Twin(self.backend, self._guarded)


class _Twin:
    """A tokenizer whose control tokens have names that no text spells, and which gives the same ids all the same."""

    def __init__(self, backend: Tokenizer, guarded: Collection[str]) -> None:
        self.names = {token: f"{_OPEN}{i}{_CLOSE}" for i, token in enumerate(sorted(guarded))}
        content = json.loads(backend.to_str())
        for token in content["added_tokens"]:
            token["content"] = self.names.get(token["content"], token["content"])
        self.backend = Tokenizer.from_str(json.dumps(content))
        ids = {self.names.get(t.content, t.content): i for i, t in backend.get_added_tokens_decoder().items()}
        self.real_ids = {i: ids[t.content] for i, t in self.backend.get_added_tokens_decoder().items()}
        self.guarded_ids = {ids[name] for name in self.names.values()} - self.real_ids.keys()

    def encode(self, text: str) -> list[int]:
        ids = encode(self.backend, text, add_special_tokens=False)
        if not self.guarded_ids.isdisjoint(ids):  # the merges of some SentencePiece vocabularies make </s> from plain text
            raise InvalidRequestError("a message spells a control token that cannot be encoded as text", param="messages")
        return [self.real_ids.get(i, i) for i in ids]


def _any_of(tokens: Collection[str]) -> re.Pattern[str]:
    """Matches the longest of the tokens; with no tokens, nothing."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value, but the keys of its objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
