"""SamplingParams: what a request asks of the sampler and when it ends. Names and defaults are vLLM's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any, Literal, Self

from jaxserve.errors import InvalidRequestError

_OF_BEAM_SEARCH = ("length_penalty", "early_stopping")
_NOT_IN_BEAM_SEARCH = (
    "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "allowed_token_ids",
    "bad_words", "stop", "min_tokens", "logprobs", "prompt_logprobs",
)  # fmt: skip
_ALL_TOKENS = {"top_k": -1}  # besides the default


class OutputKind(Enum):
    """Which outputs a request's stream carries."""

    CUMULATIVE = "cumulative"  # everything so far, at each step
    DELTA = "delta"  # what is new since the last output
    FINAL_ONLY = "final_only"  # one output, at the end


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is sampled and when it stops.

    Attributes:
        n: completions to return for the prompt.
        best_of: completions to sample, of which the n with the highest cumulative log probability are returned.
        use_beam_search: search for the likeliest completions, with best_of (or n) beams, instead of sampling.
        length_penalty: beams are ranked by cumulative log probability / length ** length_penalty; above 0 favours long ones.
        early_stopping: when a beam search ends. True: as soon as there are enough completions; False: when the best running
            beam scores no better than the worst of them; "never": when it could not even at its best possible length.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k likeliest tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of likeliest tokens with at least this probability.
        min_p: drop tokens less likely than this fraction of the likeliest one's probability.
        presence_penalty: subtracted from the logits of tokens that the output holds already.
        frequency_penalty: subtracted once for each time that the output holds the token.
        repetition_penalty: divides positive, multiplies negative logits of tokens in the prompt or output (CTRL, 2019).
        logit_bias: token id -> what is added to its logit.
        allowed_token_ids: only these can be sampled; None allows all.
        bad_words: strings that the output must not hold; a word's last token is banned where the others stand before it.
        seed: makes the request's tokens reproducible; None draws one from the engine's seed.
        stop: strings that end the text; the text is cut before them.
        stop_token_ids: token ids that end the text, besides the model's end-of-sequence ids.
        include_stop_str_in_output: keep the stop string at the end of the text.
        ignore_eos: go on past the model's end-of-sequence ids.
        max_tokens: output tokens at most; None is as many as the model's length allows.
        min_tokens: end-of-sequence and stop ids cannot be sampled before this many output tokens.
        logprobs: how many likeliest tokens to report with each output token (-1: the whole vocabulary).
        prompt_logprobs: the same for each prompt token.
        detokenize: give text as well as ids.
        skip_special_tokens: leave special tokens out of the text.
        output_kind: which outputs a stream carries.
    """

    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    output_kind: OutputKind = OutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "bad_words", tuple(self.bad_words or ()))
        _check(self.n >= 1, "n", "at least 1", self.n)
        _check(self.best_of is None or self.best_of >= self.n, "best_of", f"at least n ({self.n})", self.best_of)
        for name in ("presence_penalty", "frequency_penalty"):
            _check(-2 <= getattr(self, name) <= 2, name, "between -2 and 2", getattr(self, name))
        _check(self.repetition_penalty > 0, "repetition_penalty", "above 0", self.repetition_penalty)
        _check(self.allowed_token_ids is None or len(self.allowed_token_ids) > 0, "allowed_token_ids", "not empty", ())
        _check(all(self.bad_words), "bad_words", "non-empty strings", self.bad_words)
        _check(self.temperature >= 0, "temperature", "0 or more", self.temperature)
        _check(0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p)
        _check(self.top_k >= -1, "top_k", "-1 or 0 (all tokens), or a positive count", self.top_k)
        _check(0 <= self.min_p <= 1, "min_p", "between 0 and 1", self.min_p)
        _check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1", self.max_tokens)
        _check(self.min_tokens >= 0, "min_tokens", "0 or more", self.min_tokens)
        if self.max_tokens is not None:
            _check(self.min_tokens <= self.max_tokens, "min_tokens", f"at most max_tokens ({self.max_tokens})", self.min_tokens)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _check(value is None or value >= -1, name, "-1 (the whole vocabulary), 0 or a count", value)
        _check(all(self.stop), "stop", "non-empty strings", self.stop)
        if self.stop and not self.detokenize:
            raise InvalidRequestError("stop strings need detokenize=True; use stop_token_ids without it", param="stop")
        if self.best_of is not None and self.output_kind is OutputKind.DELTA:
            raise InvalidRequestError("best_of cannot be streamed: the best are known at the end", param="best_of")
        self._check_beam_search()
        if self.seed is not None:
            _check(-(2**63) <= self.seed < 2**64, "seed", "a 64-bit integer", self.seed)

    def _check_beam_search(self) -> None:
        _check(abs(self.length_penalty) <= 10, "length_penalty", "between -10 and 10", self.length_penalty)
        is_known = isinstance(self.early_stopping, bool) or self.early_stopping == "never"
        _check(is_known, "early_stopping", 'true, false or "never"', self.early_stopping)
        names, why = (_NOT_IN_BEAM_SEARCH, "does not go with") if self.use_beam_search else (_OF_BEAM_SEARCH, "needs")
        for name in names:
            if getattr(self, name) not in (_DEFAULTS[name], _ALL_TOKENS.get(name)):
                raise InvalidRequestError(f"{name} {why} use_beam_search", param=name)
        if not self.use_beam_search:
            return
        _check(self.temperature in (0, 1), "temperature", "0 or 1 with use_beam_search, which draws nothing", self.temperature)
        if self.output_kind is OutputKind.DELTA:
            raise InvalidRequestError("a beam search cannot be streamed: the best are known at the end", param="use_beam_search")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def num_samples(self) -> int:
        """Completions to sample, or beams to keep."""
        return self.n if self.best_of is None else self.best_of

    @classmethod
    def from_defaults(cls, defaults: Mapping[str, Any], **given: Any) -> Self:
        """Params from the model's generation_config, overridden by what the request gives (None counts as not given)."""
        merged = {k: v for k, v in defaults.items() if k in _DEFAULTS and v is not None}
        merged |= {k: v for k, v in given.items() if v is not None}
        return cls(**merged)

    def with_(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return replace(self, **changes)


_DEFAULTS = {f.name: f.default for f in fields(SamplingParams)}


def _check(ok: bool, name: str, wanted: str, got: object) -> None:
    if not ok:
        raise InvalidRequestError(f"{name} must be {wanted}; got {got!r}", param=name)
