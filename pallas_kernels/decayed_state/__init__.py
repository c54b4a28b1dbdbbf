"""One token's step of linear attention with a decaying state (Mamba 2), in place in each request's slot."""

from jaxserve.pallas_kernels.decayed_state.api import advance as advance
from jaxserve.pallas_kernels.decayed_state.api import serves as serves
