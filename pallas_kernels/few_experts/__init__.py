"""A mixture of experts for a step of few tokens on a GPU: what is left between the router and the sum is three kernels."""

from jaxserve.pallas_kernels.few_experts.api import TOKENS as TOKENS
from jaxserve.pallas_kernels.few_experts.api import Choice as Choice
from jaxserve.pallas_kernels.few_experts.api import Score as Score
from jaxserve.pallas_kernels.few_experts.api import choose as choose
from jaxserve.pallas_kernels.few_experts.api import multiply as multiply
from jaxserve.pallas_kernels.few_experts.api import serves as serves
