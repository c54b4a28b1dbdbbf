"""A conversation in the terminal, with an engine in this process."""

from __future__ import annotations

import asyncio
import re
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from jaxserve.errors import ConfigError, RequestError
from jaxserve.sampling_params import OutputKind, SamplingParams

if TYPE_CHECKING:
    from jaxserve.async_engine import AsyncEngine

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Model text without the control characters that would steer the terminal."""
    return _CONTROLS.sub("", text)


class Chat:
    """Reads questions from the terminal and streams the answers to it.

    Attributes:
        history: the messages so far; an answer that was stopped is in it as far as it came.
    """

    def __init__(self, engine: AsyncEngine, sampling: dict[str, Any], system: str | None) -> None:
        if engine.tokenizer is None:
            raise ConfigError("chat needs a tokenizer; leave out --skip-tokenizer-init")
        self._engine = engine
        self._tokenizer = engine.tokenizer
        params = SamplingParams.from_defaults(engine.default_sampling, **sampling, output_kind=OutputKind.DELTA)
        self._params = params.with_(max_tokens=sampling.get("max_tokens"))
        self._system = [{"role": "system", "content": system}] if system else []
        self.history: list[dict[str, str]] = []

    def run(self) -> None:
        """Talks until the user leaves."""
        with suppress(ImportError):
            import readline  # noqa: F401  (gives input() its line editing)
        print(HELP)
        with asyncio.Runner() as runner:
            while (text := _ask()) is not None:
                if text in ("/exit", "/quit"):
                    return
                if text == "/reset":
                    self.history.clear()
                    print("the conversation is forgotten")
                elif text.startswith("/"):
                    print(HELP)
                elif text:
                    self._answer(runner, text)

    def _answer(self, runner: asyncio.Runner, text: str) -> None:
        try:
            runner.run(self._stream(text))
        except KeyboardInterrupt:  # the runner has cancelled the stream already
            print("(stopped)")
        except RequestError as e:
            print(f"error: {e}", file=sys.stderr)

    async def _stream(self, text: str) -> None:
        question = {"role": "user", "content": text}
        token_ids = self._tokenizer.apply_chat_template([*self._system, *self.history, question])
        stream = self._engine.submit(token_ids, self._params, continues_text=False)
        answer = ""
        try:
            async for output in stream:
                if output.error is not None:
                    raise RequestError(output.error)
                for completion in output.outputs:
                    answer += completion.text
                    print(printable(completion.text), end="", flush=True)
        finally:
            stream.abort()
            print()
            if answer:
                self.history += [question, {"role": "assistant", "content": answer}]


def _ask() -> str | None:
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print(f"\n{HELP}")
        return ""
