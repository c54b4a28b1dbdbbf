"""Which tokens of each row top-k, top-p and min-p keep."""

from jaxserve.pallas_kernels.kept_tokens.api import Cuts, least_kept, order_of

__all__ = ["Cuts", "least_kept", "order_of"]
