"""A mixture of experts: each token goes through the few experts that its router chooses."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxserve.models.interface import Runtime, StepBatch
from jaxserve.models.layers import few_tokens
from jaxserve.models.layers.linear import linear, parameter, value
from jaxserve.models.layers.mlp import Mlp, activate
from jaxserve.models.layers.norms import Norm, apply_norm
from jaxserve.models.layers.quantized import dequantized
from jaxserve.models.layers.router import Routes, route, shaped
from jaxserve.models.spec import MoeSpec, NormSpec
from jaxserve.pallas_kernels.grouped_matmul import choose_block, group_rows, grouped_matmul
from jaxserve.pallas_kernels.paged_attention import Implementation


class Moe(nnx.Module):
    """Sum of the chosen experts' outputs by their weights, plus the shared expert's.

    Attributes:
        router: [D, E], with a column for each expert that gives back what goes in behind them.
        choice_bias: as many, in float32: it decides between close scores.
        experts_up: [E, D, 2 F], gates before ups ([E, D, F] if the experts are not gated): the matrix as products take it, because
            the tiles of a TPU would lie otherwise in [E, D, 2, F], and each step would copy it; experts_down: [E, F, D].
        shared_gate: [D, 1].
    """

    def __init__(self, d_model: int, spec: MoeSpec, dtype: DTypeLike) -> None:
        experts, expert, choices = spec.num_experts, spec.expert, spec.num_experts + spec.num_identity
        parts, axes = 2 if expert.gated else 1, ("experts", None, None)
        by_input = {"contract": 1, "batch": 1}
        self.spec = spec
        self.router = parameter((d_model, choices), ("embed", None), dtype, std=d_model**-0.5)  # decides: never quantised
        self.router_norm = _norm(d_model, spec.router.norm, dtype)
        self.router_bias = parameter((choices,), (None,), dtype) if spec.router.bias else None
        self.choice_bias = parameter((choices,), (None,), jnp.float32) if spec.router.choice_bias else None
        self.expert_scale = parameter((choices,), (None,), dtype, mean=1.0) if spec.router.expert_scale else None
        self.experts_norm, self.experts_out_norm = (_norm(d_model, spec.norms, dtype) for _ in range(2))
        self.experts_up = parameter((experts, d_model, parts * expert.dim), axes, dtype, std=d_model**-0.5, **by_input)
        self.experts_up_bias = parameter((experts, parts * expert.dim), axes[:2], dtype) if expert.bias else None
        self.experts_down = parameter((experts, expert.dim, d_model), axes, dtype, std=expert.dim**-0.5, **by_input)
        self.experts_down_bias = parameter((experts, d_model), axes[:2], dtype) if expert.bias else None
        self.shared = Mlp(d_model, spec.shared, dtype) if spec.shared is not None else None
        self.out_norm = _norm(d_model, spec.out_norm, dtype)
        self.shared_norm, self.shared_out_norm = (_norm(d_model, spec.norms if spec.shared else None, dtype) for _ in range(2))
        is_gated = spec.shared_gate
        self.shared_gate = parameter((d_model, 1), ("embed", None), dtype, std=d_model**-0.5) if is_gated else None

    def __call__(self, x: Float[Array, "T D"], batch: StepBatch, runtime: Runtime) -> Float[Array, "T D"]:
        spec, routed = self.spec, apply_norm(self.router_norm, x)
        arrays = (
            dequantized(self.experts_up.get_value(), 1, x.dtype),
            value(self.experts_up_bias),
            dequantized(self.experts_down.get_value(), 1, x.dtype),
            value(self.experts_down_bias),
        )
        tokens, given_back = apply_norm(self.experts_norm, x), None
        if few_tokens.serves(tokens, spec, arrays, runtime):
            biases = value(self.router_bias), value(self.choice_bias)
            choice = few_tokens.choose(routed, self.router.get_value(), biases, spec, batch)
            out = few_tokens.sum_experts(tokens, choice, arrays, spec)
        else:
            weights, chosen = self._route(routed)
            has_weights = batch.in_use[:, None] & (chosen < spec.num_experts)  # padding wakes no expert
            experts = jnp.where(has_weights, chosen, spec.num_experts)
            by_expert = partial(self._sorted_by_expert, implementation=runtime.attention)
            sum_experts = self._every_expert if _reads_all(x.shape[0], spec, runtime) else by_expert
            out = runtime.over_experts(sum_experts, (tokens, weights.astype(x.dtype), experts), arrays, batch)
            if spec.num_identity:
                given_back = x * jnp.sum(jnp.where(chosen < spec.num_experts, 0, weights), axis=-1, keepdims=True).astype(x.dtype)
        out = apply_norm(self.experts_out_norm, out)
        if self.shared is not None:
            shared = apply_norm(self.shared_out_norm, self.shared(apply_norm(self.shared_norm, x), batch, runtime))
            if self.shared_gate is not None:
                shared *= jax.nn.sigmoid(linear(x, self.shared_gate.get_value()))
            out += shared
        if given_back is not None:
            out += given_back
        return apply_norm(self.out_norm, out)

    def _route(self, x: Float[Array, "T D"]) -> Routes:
        spec = self.spec
        logits = shaped(linear(x, self.router.get_value(), out_dtype=jnp.float32), spec.router, value(self.router_bias))
        weights, experts = route(logits, spec.router, spec.top_k, value(self.choice_bias))
        if self.expert_scale is not None:
            weights *= self.expert_scale.get_value()[experts].astype(weights.dtype)
        return weights, experts

    def _every_expert(
        self,
        x: Float[Array, "T D"],
        weights: Float[Array, "T k"],
        experts: Array,
        first: Array,
        up: Float[Array, "E D M"],
        up_bias: Float[Array, "E M"] | None,
        down: Float[Array, "E F D"],
        down_bias: Float[Array, "E D"] | None,
    ) -> Float[Array, "T D"]:
        """As _sorted_by_expert, with every token through every expert, those not chosen weighing 0."""
        num, num_tokens = up.shape[0], x.shape[0]
        chosen = experts[..., None] - first == jnp.arange(num)  # [T, k, E]
        weight_of = jnp.sum(jnp.where(chosen, weights[..., None], 0), axis=1)
        rows = jnp.broadcast_to(x, (num, *x.shape))
        if self.spec.weight_on_input:
            rows = rows * weight_of.T[..., None]
        hidden = _by_expert("ETD,EDM->ETM", rows, up)
        if up_bias is not None:
            hidden += up_bias[:, None]
        hidden = self._activate(hidden.reshape(num * num_tokens, -1)).reshape(num, num_tokens, -1)
        if not self.spec.weight_on_input:
            hidden *= weight_of.T[..., None]
        out = _by_expert("ETF,EFD->TD", hidden, down)
        return out if down_bias is None else out + weight_of @ down_bias

    def _sorted_by_expert(
        self,
        x: Float[Array, "T D"],
        weights: Float[Array, "T k"],
        experts: Array,
        first: Array,
        up: Float[Array, "E D M"],
        up_bias: Float[Array, "E M"] | None,
        down: Float[Array, "E F D"],
        down_bias: Float[Array, "E D"] | None,
        *,
        implementation: Implementation,
    ) -> Float[Array, "T D"]:
        """The part of the sum that experts `first` to first + E give. Tokens are sorted by expert, so each is read once."""
        num, top_k = up.shape[0], experts.shape[1]
        block = choose_block(experts.size, num, implementation)
        groups = group_rows(experts.reshape(-1) - first, num, block)  # other experts are of other devices, or of nobody
        rows = x[groups.source // top_k]
        if self.spec.weight_on_input:
            rows *= weights.reshape(-1)[groups.source][:, None]
        hidden = grouped_matmul(rows, up, groups, implementation)
        if up_bias is not None:
            hidden += up_bias[groups.of_row]
        out = grouped_matmul(self._activate(hidden), down, groups, implementation)
        if down_bias is not None:
            out += down_bias[groups.of_row]
        out = out.at[groups.place].get(mode="fill", fill_value=0).reshape(*experts.shape, -1)
        return jnp.sum(out if self.spec.weight_on_input else out * weights[..., None], axis=1)

    def _activate(self, up: Float[Array, "rows M"]) -> Float[Array, "rows F"]:
        return activate(self.spec.expert, up.reshape(up.shape[0], -1, self.spec.expert.dim))


def _norm(d_model: int, spec: NormSpec | None, dtype: DTypeLike) -> Norm | None:
    return None if spec is None else Norm(d_model, spec, dtype)


def _reads_all(num_tokens: int, spec: MoeSpec, runtime: Runtime) -> bool:
    """Whether to put every token through every expert.

    On a GPU a step of some hundred tokens takes as long as reading the weights takes, however much is computed beside it, and
    few experts are left out once tokens have chosen twice as many as there are. One plain product is then the fastest (at 256
    tokens too: measured). Not in the smallest step, which one request alone has too.
    """
    return runtime.platform == "gpu" and 16 < num_tokens <= 256 and num_tokens * spec.top_k >= 2 * spec.num_experts


def _by_expert(contract: str, x: Array, w: Array) -> Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(contract, x, w, precision=precision, preferred_element_type=x.dtype)
