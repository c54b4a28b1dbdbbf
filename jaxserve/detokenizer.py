"""Token ids to text as they come, and stop strings. One Detokenizer a completion; knows no requests."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from jaxserve.sampling_params import SamplingParams
from jaxserve.tokenizer import Tokenizer

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Turns one completion's ids into text, at about a microsecond an id.

    The text only grows: what may still change (a part of a character) or be cut off (the beginning of a stop string) is held
    back. In the end it is what `Tokenizer.decode` gives for all ids, cut where the first stop string came.

    Attributes:
        num_tokens: ids taken, the last of them the one that completed the stop string.
        stop: the stop string that has ended the text.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, *, continues_text: bool = False) -> None:
        """
        Args:
            params: read are stop, include_stop_str_in_output, min_tokens and skip_special_tokens.
            continues_text: keep the first space that `Tokenizer.decode` drops for some models, as other text goes before.
        """
        self.num_tokens = 0
        self.stop: str | None = None
        self._given: list[str] = []  # what deltas have carried
        self._fresh: list[str] = []  # what the next one will
        self._bytes_of = tokenizer.token_bytes
        self._skipped: frozenset[int] = tokenizer.special_ids if params.skip_special_tokens else frozenset()
        self._drops_space = tokenizer.strips_space and not continues_text
        self._decoder = _Utf8Decoder("replace")
        self._is_inside = False  # a character
        self._stops = params.stop
        self._keeps_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._beginnings = frozenset(stop[:n] for stop in params.stop for n in range(1, len(stop)))
        self._longest_beginning = max(map(len, params.stop), default=1) - 1
        self._held = ""  # the longest end of the text that begins a stop string

    def append(self, token_ids: Sequence[int]) -> str | None:
        """Takes the next ids; those after the end of a stop string are dropped.

        Returns:
            the stop string that has ended the text.
        """
        if not self._stops:
            self.num_tokens += len(token_ids)
            self._add(self._decode(b"".join([self._bytes_of(i) for i in token_ids if i not in self._skipped])))
            return None
        for token_id in token_ids:
            if self.stop is not None:
                break
            self.num_tokens += 1
            if token_id not in self._skipped:
                self._add(self._decode(self._bytes_of(token_id)))
        return self.stop

    @property
    def text(self) -> str:
        """All that may be shown by now."""
        return "".join(self._given) + "".join(self._fresh)

    def finish(self) -> None:
        """Releases what was held back, as no more ids will come; a part of a character becomes U+FFFD."""
        if self.stop is None:
            self._fresh.append(self._held + self._decoder.decode(b"", final=True))
            self._held = ""

    def take_delta(self) -> str:
        """What `text` has gained since the last call."""
        delta = "".join(self._fresh)
        self._given.append(delta)
        self._fresh.clear()
        return delta

    def _decode(self, data: bytes) -> str:
        """The whole characters that come with some bytes."""
        if not self._is_inside:
            try:
                return data.decode()  # several times faster than the decoder that keeps parts of characters
            except UnicodeDecodeError:
                pass
        chars = self._decoder.decode(data)
        self._is_inside = bool(self._decoder.getstate()[0])
        return chars

    def _add(self, chars: str) -> None:
        """Takes the next whole characters."""
        if self._drops_space and chars:
            self._drops_space = False
            chars = chars.removeprefix(" ")
        if not self._stops or not chars:
            self._fresh.append(chars)
            return
        window = self._held + chars
        if self.num_tokens >= self._min_tokens and (found := self._find_stop(window)) is not None:
            end, self.stop = found
            self._fresh.append(window[: end if self._keeps_stop else end - len(self.stop)])
            return
        num_held = self._num_held(window)
        self._held = window[len(window) - num_held :]
        self._fresh.append(window[: len(window) - num_held])

    def _find_stop(self, window: str) -> tuple[int, str] | None:
        """Where the stop string that is complete first ends, and which it is: the longest of those that end there."""
        found = [(at + len(stop), -len(stop), stop) for stop in self._stops if (at := window.find(stop)) >= 0]
        if not found:
            return None
        end, _, stop = min(found)
        return end, stop

    def _num_held(self, window: str) -> int:
        """How many characters at the end begin a stop string."""
        longest = min(self._longest_beginning, len(window))
        return next((n for n in range(longest, 0, -1) if window[-n:] in self._beginnings), 0)
