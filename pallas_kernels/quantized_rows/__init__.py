"""Rows rounded to e4m3 with a scale for each, together with what makes them."""

from jaxserve.pallas_kernels.quantized_rows.api import quantize as quantize
from jaxserve.pallas_kernels.quantized_rows.api import quantize_gated as quantize_gated
from jaxserve.pallas_kernels.quantized_rows.api import quantize_normed as quantize_normed
