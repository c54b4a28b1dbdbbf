"""Attention over a paged KV pool, and the write of new keys and values into it."""

from jaxserve.pallas_kernels.paged_attention.api import Implementation as Implementation
from jaxserve.pallas_kernels.paged_attention.api import choose_implementation as choose_implementation
from jaxserve.pallas_kernels.paged_attention.api import head_axis as head_axis
from jaxserve.pallas_kernels.paged_attention.api import paged_attention as paged_attention
from jaxserve.pallas_kernels.paged_attention.api import pages_shape as pages_shape
from jaxserve.pallas_kernels.paged_attention.api import rotate_and_write as rotate_and_write
from jaxserve.pallas_kernels.paged_attention.api import write_kv as write_kv
