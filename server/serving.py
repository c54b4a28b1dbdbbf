"""From a request's fields to what the engine takes: prompt token ids and SamplingParams. Knows no HTTP."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from jaxserve.errors import InvalidRequestError, PromptTooLongError
from jaxserve.sampling_params import OutputKind, SamplingParams
from jaxserve.server.batch import Batch
from jaxserve.server.config import ServerConfig
from jaxserve.server.errors import ModelNotFoundError
from jaxserve.server.prompt_threads import PromptThreads
from jaxserve.server.protocol import ChatFields, ChatRequest, CompletionRequest, SamplingFields

if TYPE_CHECKING:
    from starlette.requests import Request

    from jaxserve.async_engine import AsyncEngine
    from jaxserve.tokenizer import Tokenizer

# SamplingParams that a request's fields give as they are
_SAME_NAME = (
    "n", "use_beam_search", "length_penalty", "early_stopping", "temperature", "top_p", "top_k", "min_p", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "logit_bias", "allowed_token_ids", "bad_words", "seed", "stop", "stop_token_ids",
    "min_tokens", "ignore_eos", "skip_special_tokens", "include_stop_str_in_output",
)  # fmt: skip
SHORT = 1000  # characters that are encoded sooner than they are handed to another thread
MESSAGE = 20  # characters that take as long as a message does, beyond its text
# In a request's state, where the check of its key has put them
SALT = "cache_salt"
OWNER = "owner"
# What the server itself gives the chat template
_TEMPLATE_OWN = {
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize", "return_dict",
}  # fmt: skip


class Serving:
    """The engine as the routes see it.

    Attributes:
        model_name: the name that clients use.
        max_model_len: prompt and output tokens of one request at most.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        prompt_timeout_s: float = ServerConfig.prompt_timeout,
        before_submit: Callable[[str], None] = lambda _: None,
    ) -> None:
        """
        Args:
            before_submit: is told the id of each request of the engine, in the context of the HTTP request.
        """
        model = engine.config.model
        self.engine = engine
        self.model_name = model.served_model_name or model.model
        self.max_model_len = cast(int, model.max_model_len)  # the engine has resolved it
        self._threads = PromptThreads(prompt_timeout_s)
        self._before_submit = before_submit

    def close(self) -> None:
        self._threads.close()

    def check_model(self, name: str | None) -> None:
        """Holds a request to the model that is served; a request without a name gets it.

        Raises:
            ModelNotFoundError: it wants another one.
        """
        if name is not None and name != self.model_name:
            raise ModelNotFoundError(f"the model {name!r} does not exist; this server has {self.model_name!r}", param="model")

    async def start_chat(self, body: ChatRequest, request_id: str, salt: str = "") -> Batch:
        """Submits a chat.

        Args:
            salt: prompts of different salts share no cached pages, whatever their cache_salt is.
        """
        self.check_model(body.model)
        token_ids = await self.chat_prompt(body)
        params = self.sampling_params(body, len(token_ids))
        return self._submit(body, [(token_ids, params)], request_id, salt, continues_text=body.continue_final_message)

    async def start_completion(self, body: CompletionRequest, request_id: str, salt: str = "") -> Batch:
        """Submits prompts. See start_chat."""
        self.check_model(body.model)
        prompts = [(ids, self.sampling_params(body, len(ids))) for ids in await self.prompts(body)]
        return self._submit(body, prompts, request_id, salt, continues_text=True)

    def _submit(
        self,
        body: SamplingFields,
        prompts: list[tuple[list[int], SamplingParams]],
        request_id: str,
        salt: str,
        continues_text: bool,
    ) -> Batch:
        own = body.cache_salt or ""
        both = json.dumps([salt, own]) if salt or own else ""
        options: dict[str, Any] = {"priority": body.priority, "cache_salt": both, "continues_text": continues_text}
        return Batch(self.engine, prompts, request_id, self._before_submit, **options)

    async def chat_prompt(self, body: ChatFields) -> list[int]:
        """The token ids of a chat's messages in the model's template."""
        tokenizer = self.tokenizer("messages")
        kwargs = body.chat_template_kwargs or {}
        num_characters = sum(len(message.content) + len(message.name or "") for message in body.messages)
        num_characters += sum(len(value) for value in kwargs.values() if isinstance(value, str))
        self._check_size(tokenizer, num_characters, "messages")
        for name in kwargs:
            if name in _TEMPLATE_OWN or not _is_read_by(tokenizer.chat_template or "", name):
                text = f"chat_template_kwargs: {name!r} is not a variable of this model's chat template"
                raise InvalidRequestError(text, param="chat_template_kwargs")
        messages = [message.as_dict() for message in body.messages]
        options = dict(kwargs)
        if body.continue_final_message:
            options["continue_final_message"] = True

        def encode() -> list[int]:
            return tokenizer.apply_chat_template(messages, add_generation_prompt=body.begins_message, **options)

        size = num_characters + MESSAGE * len(messages)
        return encode() if size <= SHORT else await self._threads.run(size, encode)

    async def prompts(self, body: CompletionRequest) -> list[list[int]]:
        """The token ids of each prompt."""
        texts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
        if not texts:
            return cast(list[list[int]], body.prompt)
        return await self.encode(texts, body.add_special_tokens)

    async def encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        """The token ids of some prompts."""
        tokenizer = self.tokenizer("prompt")
        for text in texts:
            self._check_size(tokenizer, len(text), "prompt")

        def encode() -> list[list[int]]:
            return [tokenizer.encode(text, add_special_tokens) for text in texts]

        size = sum(map(len, texts)) + MESSAGE * len(texts)
        return encode() if size <= SHORT else await self._threads.run(size, encode)

    async def decode(self, token_ids: list[int]) -> str:
        """The text of token ids, special tokens included."""
        tokenizer = self.tokenizer("tokens")
        return await self._threads.run(len(token_ids), lambda: tokenizer.decode(token_ids, False))

    async def prompt_texts(self, body: CompletionRequest) -> list[str]:
        """The text of each prompt, from its token ids where it came as such; empty without a tokenizer."""
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            return [""] * len(body.prompt)

        def texts() -> list[str]:
            return [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in body.prompt]

        return await self._threads.run(sum(map(len, body.prompt)), texts)

    def sampling_params(self, body: SamplingFields, num_prompt_tokens: int) -> SamplingParams:
        """The request's fields over the model's defaults.

        Raises:
            PromptTooLongError: the prompt, or the prompt with the output asked for, is longer than the model allows.
        """
        room = self.max_model_len - num_prompt_tokens
        asked = body.max_output_tokens
        if room < 1:
            text = f"the prompt has {num_prompt_tokens:,} tokens; prompt and output may have {self.max_model_len:,}. "
            raise PromptTooLongError(text + "Shorten it or raise --max-model-len.", param=_prompt_field(body))
        if asked is not None and asked > room:
            text = (
                f"max_tokens is {asked:,} and the prompt has {num_prompt_tokens:,} tokens; both may have {self.max_model_len:,}. "
            )
            raise PromptTooLongError(text + f"Lower max_tokens to {room:,} or shorten the prompt.", param="max_tokens")
        defaults = self.engine.default_sampling
        if asked is None:
            asked = min(room, body.default_max_tokens or defaults.get("max_tokens") or room)
        if body.use_beam_search:
            defaults = {}  # they say how to draw, and a search draws nothing
        fields = vars(body)
        given = {name: value for name in _SAME_NAME if (value := fields[name]) is not None}
        if isinstance(body, CompletionRequest):
            given["best_of"] = body.best_of if body.best_of != body.n else None  # else it could not be streamed
        return SamplingParams.from_defaults(
            defaults,
            **given,
            max_tokens=asked,
            logprobs=body.num_logprobs,
            prompt_logprobs=body.num_prompt_logprobs,
            detokenize=self.engine.tokenizer is not None,
            output_kind=OutputKind.DELTA if body.stream else OutputKind.FINAL_ONLY,
        )

    def gives_token_ids(self, body: SamplingFields) -> bool:
        """Whether the reply carries token ids; without a tokenizer it has nothing else."""
        return body.return_token_ids or self.engine.tokenizer is None

    def _check_size(self, tokenizer: Tokenizer, num_characters: int, field: str) -> None:
        """Refuses a text that cannot fit, before time is spent on its tokens."""
        most = self.max_model_len * tokenizer.longest_token
        if num_characters > most:
            text = (
                f"the prompt has {num_characters:,} characters; {self.max_model_len:,} tokens hold {most:,} at most. Shorten it."
            )
            raise PromptTooLongError(text, param=field)

    def tokenizer(self, field: str) -> Tokenizer:
        """The tokenizer, for what came in this field of a request.

        Raises:
            InvalidRequestError: there is none.
        """
        if self.engine.tokenizer is None:
            text = "this server has no tokenizer (--skip-tokenizer-init); send token ids as the prompt to /v1/completions"
            raise InvalidRequestError(text, param=field)
        return self.engine.tokenizer


def owner_of(request: Request) -> str:
    """The name of the client's key; the same for all where there are no keys."""
    return str(request.scope.get("state", {}).get(OWNER, ""))


def salt_of(request: Request) -> str:
    """What keeps the cached pages of this client's prompts apart from those of others; empty where they are shared."""
    return str(request.scope.get("state", {}).get(SALT, ""))


def _prompt_field(body: SamplingFields) -> str:
    return "messages" if isinstance(body, ChatRequest) else "prompt"


def _is_read_by(template: str, name: Any) -> bool:
    return str(name).isidentifier() and re.search(rf"\b{name}\b", template) is not None
