"""The engine requests of one HTTP request: submitted together, read as one stream, aborted together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
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
        self, engine: AsyncEngine, prompts: Sequence[tuple[list[int], SamplingParams]], request_id: str, **options: Any
    ) -> None:
        """Submits every prompt, or none: when one is refused, those before it are aborted.

        Args:
            **options: the same for each prompt, as AsyncEngine.submit takes them.
        """
        self.request_id = request_id
        self.prompts = [token_ids for token_ids, _ in prompts]
        self._streams: list[RequestStream] = []
        try:
            for i, (token_ids, params) in enumerate(prompts):
                self._streams.append(engine.submit(token_ids, params, request_id=f"{request_id}-{i}", **options))
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Frees what the requests hold; harmless for those that have ended."""
        for stream in self._streams:
            stream.abort()

    async def outputs(self) -> AsyncGenerator[tuple[int, RequestOutput]]:
        """Yields (index of the prompt, output) as the outputs come.

        Raises:
            RequestError: the engine could not finish one of the requests.
        """
        if len(self._streams) == 1:
            async for output in self._streams[0]:
                yield 0, _checked(output)
            return
        queue: asyncio.Queue[tuple[int, RequestOutput | None]] = asyncio.Queue()
        pumps = [asyncio.create_task(_pump(i, stream, queue)) for i, stream in enumerate(self._streams)]
        num_open = len(pumps)
        try:
            while num_open:
                i, item = await queue.get()
                if item is not None:
                    yield i, _checked(item)
                else:
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


def _checked(output: RequestOutput) -> RequestOutput:
    if output.error is not None:
        raise RequestError(output.error)
    return output
