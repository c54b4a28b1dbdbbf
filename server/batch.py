"""The engine requests of one HTTP request: submitted together, read as one stream, aborted together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from jaxserve.errors import RequestError
from jaxserve.outputs import RequestOutput
from jaxserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxserve.async_engine import AsyncEngine, RequestStream


class Batch:
    """One engine request for each prompt.

    Attributes:
        prompts: the prompts' token ids.
        request_id: of the HTTP request; the engine's have a number behind it.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        prompts: Sequence[tuple[list[int], SamplingParams]],
        request_id: str,
        before: Callable[[str], None] = lambda _: None,
        **options: Any,
    ) -> None:
        """Submits every prompt, or none: when one is refused, those before it are aborted.

        Args:
            before: called with the id of each engine request, before it is submitted.
            **options: the same for each prompt, as AsyncEngine.submit takes them.
        """
        self.request_id = request_id
        self.prompts = [token_ids for token_ids, _ in prompts]
        self._streams: list[RequestStream] = []
        try:
            for i, (token_ids, params) in enumerate(prompts):
                name = f"{request_id}-{i}"
                before(name)
                self._streams.append(engine.submit(token_ids, params, request_id=name, **options))
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Frees what the requests hold; harmless for those that have ended."""
        for stream in self._streams:
            stream.abort()

    async def outputs(self) -> AsyncGenerator[list[tuple[int, RequestOutput]]]:
        """Yields (index of the prompt, output) for all that has come since the last time: under load, one write for several.

        Raises:
            RequestError: the engine could not finish one of the requests.
        """
        async with aclosing(self._news()) as all_news:
            async for news in all_news:
                errors = [output.error for _, output in news if output.error is not None]
                if len(errors) < len(news):
                    yield [item for item in news if item[1].error is None]
                if errors:
                    raise RequestError(errors[0])

    async def _news(self) -> AsyncGenerator[list[tuple[int, RequestOutput]]]:
        if len(self._streams) == 1:
            (stream,) = self._streams
            async for output in stream:
                yield [(0, output), *((0, more) for more in stream.more())]
            return
        queue: asyncio.Queue[tuple[int, RequestOutput | None]] = asyncio.Queue()
        pumps = [asyncio.create_task(_pump(i, stream, queue)) for i, stream in enumerate(self._streams)]
        num_open = len(pumps)
        try:
            while num_open:
                items = [await queue.get()]
                while not queue.empty():
                    items.append(queue.get_nowait())
                if news := [(i, output) for i, output in items if output is not None]:
                    yield news
                for i, item in items:
                    if item is None:
                        await pumps[i]  # raises what ended it
                        num_open -= 1
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(index: int, stream: RequestStream, queue: asyncio.Queue[tuple[int, RequestOutput | None]]) -> None:
    try:
        async for output in stream:
            queue.put_nowait((index, output))
    finally:
        queue.put_nowait((index, None))
