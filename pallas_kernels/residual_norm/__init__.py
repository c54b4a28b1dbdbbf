"""A residual stream to which a product is added, and its norm, in one."""

from jaxserve.pallas_kernels.residual_norm.api import add_and_normalize as add_and_normalize
