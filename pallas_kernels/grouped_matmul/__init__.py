"""Rows times the matrix of their group: what a mixture of experts computes."""

from jaxserve.pallas_kernels.grouped_matmul.api import Groups as Groups
from jaxserve.pallas_kernels.grouped_matmul.api import choose_block as choose_block
from jaxserve.pallas_kernels.grouped_matmul.api import group_rows as group_rows
from jaxserve.pallas_kernels.grouped_matmul.api import grouped_matmul as grouped_matmul
