"""From what a user submits to a RequestGroup: what can be served, and what the parameters mean here. Knows no requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxserve.config import SchedulerConfig
from jaxserve.errors import InvalidRequestError, PromptTooLongError
from jaxserve.request import RequestGroup
from jaxserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxserve.tokenizer import Tokenizer


@dataclass(frozen=True)
class RequestBuilder:
    """What an engine can serve."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    tokenizer: Tokenizer | None
    limits: SchedulerConfig

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams, priority: int) -> None:
        """Raises the RequestError that says why the request cannot be served."""
        if not prompt_token_ids:
            raise InvalidRequestError("the prompt has no tokens; give at least one", param="prompt")
        if len(prompt_token_ids) >= self.max_model_len:
            raise PromptTooLongError(
                f"the prompt has {len(prompt_token_ids):,} tokens; this model holds {self.max_model_len:,} with the output. "
                "Shorten the prompt or raise max_model_len.",
                param="prompt",
            )
        self._check_ids(prompt_token_ids, params)
        for name, instead in (("stop", "stop_token_ids"), ("bad_words", "logit_bias")):
            if getattr(params, name) and self.tokenizer is None:
                raise InvalidRequestError(f"{name} needs a tokenizer, and none is loaded; use {instead}", param=name)
        if priority and self.limits.scheduling_policy != "priority":
            raise InvalidRequestError(
                f"priority is {priority}, but requests run in order of arrival; leave it out, or set scheduling_policy to 'priority'",
                param="priority",
            )

    def build(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        prompt: str | None,
        *,
        cache_salt: str,
        continues_text: bool,
        arrival_s: float,
    ) -> RequestGroup:
        """The request that has passed `check`, as yet without its samples."""
        room = self.max_model_len - len(prompt_token_ids)
        return RequestGroup(
            request_id=request_id,
            prompt_token_ids=list(prompt_token_ids),
            params=params,
            max_output_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            stop_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_token_ids),
            bad_word_ids=self._bad_words(params),
            prompt=prompt,
            cache_salt=cache_salt,
            continues_text=continues_text,
            arrival_s=arrival_s,
        )

    def _check_ids(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        given = {
            "prompt": prompt_token_ids,
            "stop_token_ids": params.stop_token_ids,
            "allowed_token_ids": params.allowed_token_ids or (),
            "logit_bias": list(params.logit_bias or ()),
        }
        for name, ids in given.items():
            if min(ids, default=0) < 0 or max(ids, default=0) >= self.vocab_size:
                wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
                raise InvalidRequestError(
                    f"{name} holds token id {wrong}; the vocabulary has ids 0 to {self.vocab_size - 1}", param=name
                )

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """The token sequences that spell each bad word, at the start of a text and after a space."""
        if not params.bad_words:
            return ()
        assert self.tokenizer is not None, "check has seen to it"
        words = [w for word in params.bad_words for w in (word.lstrip(), " " + word.lstrip())]
        ids = [tuple(self.tokenizer.encode(word, add_special_tokens=False)) for word in words]
        return tuple(dict.fromkeys(word for word in ids if word))
