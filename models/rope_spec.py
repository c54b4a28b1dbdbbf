"""Rotary position embeddings as data: the base, which dimensions turn, and how a longer context is scaled to."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Every frequency divided by `factor`: positions are interpolated."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Long wavelengths are divided by `factor`, short ones kept, those between blended.

    Attributes:
        low_freq_factor: wavelengths above original_max_position / low_freq_factor are scaled in full.
        high_freq_factor: wavelengths below original_max_position / high_freq_factor are kept.
        original_max_position: tokens of context that the model was first trained on.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (https://arxiv.org/abs/2309.00071): frequencies blended by how often a pair turns in the original context.

    Attributes:
        beta_fast, beta_slow: pairs with more turns than beta_fast are kept, with fewer than beta_slow divided by `factor`.
        attention_factor: on cos and sin.
        truncate: the bounds of the blend are rounded to whole dimensions.
    """

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, kw_only=True)
class FactorScaling:
    """Each pair's frequency divided by a factor of its own (LongRoPE, https://arxiv.org/abs/2402.13753).

    Attributes:
        factors: one for each rotated pair.
        attention_factor: on cos and sin.
        context: tokens of text that it is for.
        longer: instead of this one, where texts may be longer than that.
    """

    factors: tuple[float, ...]
    attention_factor: float = 1.0
    context: int | None = None
    longer: FactorScaling | None = None


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | FactorScaling


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding (https://arxiv.org/abs/2104.09864).

    Attributes:
        theta: base of the wavelengths.
        rotary_dim: leading dimensions of a head that are rotated.
        interleaved: neighbours make a pair (GPT-J); otherwise the first half of those dimensions is paired with the second.
        frequency_dim: what the exponents of theta are shares of; rotary_dim if not given.
    """

    theta: float
    rotary_dim: int
    scaling: RopeScaling | None = None
    interleaved: bool = False
    frequency_dim: int | None = None

    @property
    def first_context(self) -> int | None:
        """Tokens of text beyond which it is another one; None if it is always the same."""
        return self.scaling.context if isinstance(self.scaling, FactorScaling) else None

    def for_longer_context(self) -> RopeSpec:
        """As it is for texts longer than that."""
        longer = self.scaling.longer if isinstance(self.scaling, FactorScaling) else None
        return self if longer is None else replace(self, scaling=longer)

    def __post_init__(self) -> None:
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(f"the rotated dimensions of a head must be an even number; got {self.rotary_dim}")
