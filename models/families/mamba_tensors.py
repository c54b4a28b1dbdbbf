"""The tensors of Mamba mixers, whose projections and convolutions every checkpoint fuses alike."""

from __future__ import annotations

from jaxserve.models.families.assembly import Projection, Same, Target
from jaxserve.models.families.recurrent_tensors import ConvRows, Rows, mixer_of
from jaxserve.models.families.tensors import Table
from jaxserve.models.recurrent_spec import Mamba2Spec


def mamba_tensors(prefix: str, path: str = "layers.{i}.mixer.") -> Table:
    """A Mamba 1 mixer, from the tensors whose names begin with `prefix` to the parameters whose paths begin with `path`."""
    return {
        path + "into": Rows(prefix + "in_proj.weight", axes=2),
        path + "into_bias": Rows(prefix + "in_proj.bias", axes=2),
        path + "conv": ConvRows(prefix + "conv1d.weight"),
        path + "conv_bias": Same(prefix + "conv1d.bias"),
        path + "select": Projection(prefix + "x_proj.weight"),
        path + "dt_proj": Projection(prefix + "dt_proj.weight"),
        path + "dt_bias": Same(prefix + "dt_proj.bias"),
        path + "a_log": Same(prefix + "A_log"),
        path + "skip": Same(prefix + "D"),
        path + "dt_norm.weight": Same(prefix + "dt_layernorm.weight"),
        path + "b_norm.weight": Same(prefix + "b_layernorm.weight"),
        path + "c_norm.weight": Same(prefix + "c_layernorm.weight"),
        path + "out": Projection(prefix + "out_proj.weight"),
        path + "out_bias": Same(prefix + "out_proj.bias"),
    }


def mamba2_tensors(prefix: str, path: str = "layers.{i}.mixer.") -> Table:
    """As mamba_tensors, for a Mamba 2 mixer."""
    into, conv = prefix + "in_proj.", prefix + "conv1d."
    return {
        path + "zx": Rows(into + "weight", axes=3, part=_zx),
        path + "bc": Rows(into + "weight", axes=3, part=_bc),
        path + "dt": Rows(into + "weight", part=_dt),
        path + "zx_bias": Rows(into + "bias", axes=3, part=_zx),
        path + "bc_bias": Rows(into + "bias", axes=3, part=_bc),
        path + "dt_in_bias": Rows(into + "bias", part=_dt),
        path + "conv_x": ConvRows(conv + "weight", axes=2, part=_conv_x),
        path + "conv_bc": ConvRows(conv + "weight", axes=3, part=_conv_bc),
        path + "conv_x_bias": Rows(conv + "bias", axes=2, part=_conv_x),
        path + "conv_bc_bias": Rows(conv + "bias", axes=3, part=_conv_bc),
        path + "dt_bias": Same(prefix + "dt_bias"),
        path + "a_log": Same(prefix + "A_log"),
        path + "skip": Same(prefix + "D"),
        path + "norm": Rows(prefix + "norm.weight", axes=2),
        path + "out": Projection(prefix + "out_proj.weight"),
        path + "out_bias": Same(prefix + "out_proj.bias"),
    }


def _sizes(target: Target) -> tuple[int, int, int]:
    """Rows of x (and of z), of B and C together, and of dt."""
    spec = mixer_of(target, Mamba2Spec)
    return spec.num_heads * spec.head_dim, 2 * spec.num_groups * spec.state_dim, spec.num_heads


def _zx(target: Target) -> tuple[int, int]:
    x, bc, dt = _sizes(target)
    return 0, 2 * x + bc + dt


def _bc(target: Target) -> tuple[int, int]:
    x, bc, dt = _sizes(target)
    return 2 * x, 2 * x + bc + dt


def _dt(target: Target) -> tuple[int, int]:
    x, bc, dt = _sizes(target)
    return 2 * x + bc, 2 * x + bc + dt


def _conv_x(target: Target) -> tuple[int, int]:
    x, bc, _ = _sizes(target)
    return 0, x + bc


def _conv_bc(target: Target) -> tuple[int, int]:
    x, bc, _ = _sizes(target)
    return x, x + bc
