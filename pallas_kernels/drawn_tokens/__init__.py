"""The token that each row's distribution gives: noise whose largest sum with the logits is a draw."""

from jaxserve.pallas_kernels.drawn_tokens.api import find_kernel
from jaxserve.pallas_kernels.drawn_tokens.noise import gumbel, threefry

__all__ = ["find_kernel", "gumbel", "threefry"]
