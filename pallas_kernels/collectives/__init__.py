"""What the devices of a mesh axis send each other."""

from jaxserve.pallas_kernels.collectives.api import add_up as add_up
from jaxserve.pallas_kernels.collectives.api import all_gather as all_gather
from jaxserve.pallas_kernels.collectives.api import all_reduce as all_reduce
from jaxserve.pallas_kernels.collectives.api import all_reduce_normed as all_reduce_normed
