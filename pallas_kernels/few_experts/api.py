"""Experts of few tokens: all tokens go through each expert that any of them has chosen, so nothing is sorted, gathered or scattered.

Reading the experts' weights is what takes time then, and a tensor core multiplies 64 rows at least, wanted or not. Knows arrays
only, neither routers nor models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
from jaxtyping import Array, Float, Int

TOKENS = 16  # of a step that this is for: the rows of a block
Score = Callable[..., tuple[Array, Array]]
"""Each expert's score for a token, which weighs it, and by what it is chosen; both [T, E] in float32."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Choice:
    """What tokens have chosen. Block b has all tokens' rows for the b-th expert that any token in use has chosen.

    Attributes:
        weights: of each token's experts, the best first; finite but unspecified for a token not in use.
        blocks: of each token's experts; -1 for a token not in use.
        experts: of each block; unspecified from num_blocks[0] on.
        num_blocks: [1].
    """

    weights: Float[Array, "T k"]
    blocks: Int[Array, "T k"]
    experts: Int[Array, " E"]
    num_blocks: Int[Array, " 1"]

    @property
    def most_blocks(self) -> int:
        """Blocks that there can be."""
        return min(self.experts.shape[0], self.blocks.size)


def serves(num_tokens: int, up: tuple[int, ...], down: tuple[int, ...]) -> bool:
    """Whether the kernels take a step of so many tokens and matrices [E, D, M] and [E, F, D]."""
    num_experts = up[0]
    is_power = num_experts & (num_experts - 1) == 0
    return num_tokens == TOKENS and is_power and num_experts <= 512 and not any(n % 64 for n in (*up[1:], *down[1:]))


def choose(
    score: Score,
    operands: Sequence[Array],
    num_used: Int[Array, " 1"],
    top_k: int,
    *,
    normalize: bool = False,
    eps: float = 0.0,
    least: float = 0.0,
    scale: float = 1.0,
    interpret: bool = False,
) -> Choice:
    """The top_k experts of each token.

    Args:
        score: computed in the kernel, of the operands.
        operands: [T, E] in float32; [S, T, E], of which it gets the sum of the parts; or [E]. The first is not [E]. E is a power of two.
        num_used: tokens from here on are not in use.
        normalize: weights are divided by their sum + eps, or by `least` if that is more.
        scale: factor on the weights, after that.
        interpret: in Pallas' interpreter.
    """
    from jaxserve.pallas_kernels.few_experts import triton

    return Choice(*triton.choose(score, operands, num_used, top_k, normalize, eps, least, scale, interpret))


def multiply(
    x: Float[Array, "rows K"],
    w: Float[Array, "E K M"],
    choice: Choice,
    activation: Callable[[Array], Array] | None = None,
) -> Float[Array, "blocks*T N"]:
    """Each block's rows times its expert's matrix; blocks from num_blocks[0] on are unspecified.

    Args:
        x: rows of every block alike [T, K], or of each block [blocks * T, K].
        activation: the result is activation(first half of the columns) * second half; None for all columns.
    """
    from jaxserve.pallas_kernels.few_experts import mosaic_gpu

    return mosaic_gpu.multiply(x, w, choice.experts, choice.num_blocks, choice.most_blocks, choice.blocks.shape[0], activation)
