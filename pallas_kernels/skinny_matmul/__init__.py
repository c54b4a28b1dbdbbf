"""Few rows times a large matrix: what decoding does with most weights."""

from jaxserve.pallas_kernels.skinny_matmul.api import serves as serves
from jaxserve.pallas_kernels.skinny_matmul.api import skinny_matmul as skinny_matmul
