"""An engine without a model: it answers with scripted text, one byte a token, through AsyncEngine's interface."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from jaxserve.config import EngineConfig
from jaxserve.errors import EngineDeadError, InvalidRequestError, PromptTooLongError, QueueFullError
from jaxserve.outputs import CompletionOutput, Logprob, RequestOutput, TokenLogprobs
from jaxserve.sampling_params import OutputKind, SamplingParams

EOS = 256
MAX_MODEL_LEN = 400
MODEL = "org/fake-model"


class FakeTokenizer:
    """A token for each byte, and one for the end."""

    eos_token_ids = (EOS,)
    vocab_size = 257
    longest_token = 1
    special_tokens: ClassVar = {"eos_token": "<eos>"}
    chat_template: str | None = "{% for m in messages %}...{% endfor %}{% if enable_thinking %}...{% endif %}"

    def __init__(self) -> None:
        self.template_kwargs: dict[str, Any] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.bytes_of(ids).decode(errors="replace")

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> list[int]:
        self.template_kwargs = kwargs
        if messages[-1]["content"] == "no template":
            raise InvalidRequestError("this model has no chat template; use /v1/completions", param="messages")
        text = "".join(f"{m['role']}: {m['content']}\n" for m in messages)
        if kwargs.get("continue_final_message"):
            text = text[:-1]
        return self.encode(text + ("assistant: " if add_generation_prompt else ""))

    def token_text(self, token_id: int) -> str:
        return "<eos>" if token_id == EOS else self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return self.bytes_of([token_id])

    @staticmethod
    def bytes_of(ids: Sequence[int]) -> bytes:
        return bytes(i for i in ids if i < EOS)


class FakeEngine:
    """Answers each prompt with `reply(prompt text, completion index)`.

    Attributes:
        hold: requests wait for ever, until they are aborted.
        fail_after: an answer breaks off with an error after so many tokens.
        crash_after: the stream itself raises after so many tokens.
        running: ids of the requests that have neither ended nor been aborted.
    """

    def __init__(self, reply: Callable[[str, int], str] | None = None, *, tokenizer: bool = True, model: str = MODEL) -> None:
        self.config = EngineConfig.from_options(model=model, skip_tokenizer_init=not tokenizer).resolve("cpu", MAX_MODEL_LEN)
        self.tokenizer = FakeTokenizer() if tokenizer else None
        self.is_started = False
        self.is_shut_down = False
        self.reset(reply)

    def reset(self, reply: Callable[[str, int], str] | None = None) -> None:
        """Forgets all requests and faults."""
        self.reply = reply or (lambda prompt, i: f"{prompt}!{i}" if i else prompt)
        self.default_sampling: dict[str, Any] = {"temperature": 0.6, "top_k": 20}
        self.is_healthy = True
        self.cause: str | None = None
        self.stalled_s = 0.0
        self.queue_limit = 64
        self.hold = False
        self.fail_after: int | None = None
        self.crash_after: int | None = None
        self.token_delay_s = 0.0
        self.num_cached_tokens = 0
        self.submitted: list[tuple[list[int], SamplingParams]] = []
        self.options: list[dict[str, Any]] = []
        self.running: set[str] = set()
        self.aborted: set[str] = set()

    def start(self) -> None:
        self.is_started = True

    def shutdown(self) -> None:
        self.is_shut_down = True

    def give_up(self, reason: str) -> None:
        self.is_healthy = False

    def describe(self) -> dict[str, str]:
        return {"model": self.config.model.model, "KV cache": "64 pages of 16 tokens"}

    def submit(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        prompt: str | None = None,
        **options: Any,
    ) -> FakeStream:
        if not self.is_healthy:
            raise EngineDeadError("the engine has stopped; restart the server")
        if len(self.running) >= self.queue_limit:
            raise QueueFullError(f"{self.queue_limit} requests wait already; try again later")
        if not prompt_token_ids:
            raise InvalidRequestError("the prompt is empty; give at least one token", param="prompt")
        if len(prompt_token_ids) >= MAX_MODEL_LEN:
            raise PromptTooLongError("the prompt is too long")
        request_id = f"request-{len(self.submitted)}" if request_id is None else request_id
        assert request_id not in self.running
        self.submitted.append((prompt_token_ids, params))
        self.options.append(options)
        self.running.add(request_id)
        return FakeStream(self, request_id, prompt_token_ids, params)


class FakeStream:
    """A token at a time, or everything at the end."""

    def __init__(self, engine: FakeEngine, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> None:
        self.request_id = request_id
        self._engine = engine
        self._prompt = prompt_token_ids
        self._params = params
        text = FakeTokenizer.bytes_of(prompt_token_ids).decode(errors="replace")
        self._writers = [Writer(i, engine.reply(text, i), params) for i in range(params.n)]
        self._num_steps = 0
        self._ended = asyncio.Event()

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._ended.is_set():
            raise StopAsyncIteration
        output = await self._step()
        if self._params.output_kind is OutputKind.FINAL_ONLY:
            while not output.finished:
                output = await self._step()
            if output.error is None:
                output.outputs = [writer.whole() for writer in self._writers]
        if output.finished:
            self._end()
        return output

    def more(self) -> tuple[RequestOutput, ...]:
        return ()

    def abort(self) -> None:
        if not self._ended.is_set():
            self._engine.aborted.add(self.request_id)
            self._end()

    async def _step(self) -> RequestOutput:
        if self._engine.hold:
            await self._ended.wait()
            raise StopAsyncIteration
        await asyncio.sleep(self._engine.token_delay_s)
        if not self._engine.is_healthy:
            return self._output([], finished=True, error="the engine has stopped")
        self._num_steps += 1
        if self._num_steps == self._engine.crash_after:
            raise KeyError("a bug, with /secret/path in its text")
        if self._num_steps == self._engine.fail_after:
            return self._output([], finished=True, error="the step failed twice; the request is lost")
        news = [writer.step() for writer in self._writers if writer.finish_reason is None]
        return self._output(news, finished=all(writer.finish_reason for writer in self._writers))

    def _output(self, outputs: list[CompletionOutput], *, finished: bool, error: str | None = None) -> RequestOutput:
        cached = self._engine.num_cached_tokens
        num_top = self._params.prompt_logprobs
        prompt_logprobs = None if num_top is None else [None, *(_logprobs(i, num_top) for i in self._prompt[1:])]
        return RequestOutput(self.request_id, None, self._prompt, outputs, finished, prompt_logprobs, cached, error)

    def _end(self) -> None:
        self._ended.set()
        self._engine.running.discard(self.request_id)


class Writer:
    """One completion: a byte a step, its text held back while a character or a stop string is incomplete."""

    def __init__(self, index: int, text: str, params: SamplingParams) -> None:
        self._index = index
        self._script = [*text.encode(), EOS]
        self._params = params
        self._token_ids: list[int] = []
        self._text = ""  # what has been given out
        self.finish_reason: Any = None
        self._stop_reason: str | None = None

    def step(self) -> CompletionOutput:
        token_id = self._script[len(self._token_ids)]
        self._token_ids.append(token_id)
        raw = FakeTokenizer.bytes_of(self._token_ids)
        if token_id == EOS:
            self.finish_reason = "stop"
        elif len(self._token_ids) == self._params.max_tokens:
            self.finish_reason = "length"
        text = raw.decode(errors="replace" if self.finish_reason else "ignore")
        for stop in self._params.stop:
            if stop in text:
                text, self.finish_reason, self._stop_reason = text[: text.index(stop)], "stop", stop
        held = 0 if self.finish_reason else max(map(len, self._params.stop), default=1) - 1
        ready = text[: len(text) - held]
        new, self._text = ready[len(self._text) :], max(ready, self._text, key=len)
        return self._completion(new if self._params.detokenize else "", [token_id])

    def whole(self) -> CompletionOutput:
        return self._completion(self._text if self._params.detokenize else "", self._token_ids)

    def _completion(self, text: str, token_ids: list[int]) -> CompletionOutput:
        logprobs = None if self._params.logprobs is None else [_logprobs(i, self._params.logprobs) for i in token_ids]
        return CompletionOutput(
            self._index, text, token_ids, logprobs=logprobs, finish_reason=self.finish_reason, stop_reason=self._stop_reason
        )


def _logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    """Odd tokens are the likeliest there, even ones came third behind the next two; the last rival is impossible."""
    tokenizer = FakeTokenizer()
    rivals = [(token_id + k) % 256 for k in range(1, 8)]
    order = [token_id, *rivals] if token_id % 2 else [*rivals[:2], token_id, *rivals[2:]]
    values = [-0.5, -1.5, -2.5, *[-math.inf] * len(order)]
    ranked = {
        i: Logprob(value, rank, tokenizer.token_text(i)) for rank, (i, value) in enumerate(zip(order, values, strict=False), 1)
    }
    return {i: logprob for i, logprob in ranked.items() if logprob.rank <= num_top or i == token_id}
