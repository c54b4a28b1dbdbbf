"""A mixture of experts for a GPU's smallest decode step, which is bound by launches: kernels/few_experts behind a model's options."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxserve.models.interface import Runtime, StepBatch
from jaxserve.models.layers.mlp import ACTIVATIONS, IN_KERNELS, activate
from jaxserve.models.layers.router import score, shaped
from jaxserve.models.spec import MoeSpec
from jaxserve.pallas_kernels import few_experts

Experts = tuple[Float[Array, "E D M"], Float[Array, "E M"] | None, Float[Array, "E F D"], Float[Array, "E D"] | None]
"""Weights and biases of the first product and of the second."""
Biases = tuple[Float[Array, " E"] | None, Float[Array, " E"] | None]
"""On the router's logits, and on what chooses."""


def serves(x: Float[Array, "T D"], spec: MoeSpec, experts: Experts, runtime: Runtime) -> bool:
    """Whether the kernels do this step. Experts of several devices are not theirs."""
    up, _, down, _ = experts
    router = spec.router
    is_odd = spec.num_identity or spec.weight_on_input or router.expert_scale or router.scores == "sparsemixer"
    is_bf16 = x.dtype == up.dtype == down.dtype == jnp.bfloat16
    return (
        runtime.attention == "mosaic_gpu"
        and runtime.has_one_device
        and not is_odd
        and is_bf16
        and few_experts.serves(x.shape[0], up.shape, down.shape)
    )


def choose(
    x: Float[Array, "T D"],
    router: Float[Array, "D E"],
    biases: Biases,
    spec: MoeSpec,
    batch: StepBatch,
) -> few_experts.Choice:
    """As router.route does, of the logits of x. The product is cut in parts, so that many multiprocessors read the router, and the
    kernel that chooses adds them up."""
    rules, count = spec.router, _num_parts(x.shape[1])
    cut = x.reshape(x.shape[0], count, -1), router.reshape(count, -1, router.shape[1])
    parts = jax.lax.dot_general(*cut, (((2,), (1,)), ((1,), (0,))), preferred_element_type=jnp.float32)  # [parts, T, E]
    operands = (parts, *(bias for bias in biases if bias is not None))

    def score_parts(logits: Array, *given: Array) -> tuple[Array, Array]:
        found = iter(given)
        router_bias, choice_bias = (None if bias is None else next(found) for bias in biases)
        return score(shaped(logits, rules, router_bias), rules, choice_bias)

    in_kernel = rules.top_groups == rules.num_groups
    if not in_kernel:  # choosing groups takes a top-k
        operands = score_parts(jnp.sum(parts, axis=0), *operands[1:])
    return few_experts.choose(
        score_parts if in_kernel else lambda *scores: scores,
        operands,
        batch.query_start[-1:],
        spec.top_k,
        normalize=rules.normalize,
        eps=rules.norm_eps,
        least=rules.norm_min,
        scale=rules.scale,
    )


def _num_parts(width: int) -> int:
    """Of a router's inputs: at most 16, of a multiple of 64 each."""
    return max(count for count in range(1, 17) if (width // 64) % count == 0)


def sum_experts(x: Float[Array, "T D"], choice: few_experts.Choice, experts: Experts, spec: MoeSpec) -> Float[Array, "T D"]:
    """The sum of each token's experts by their weights."""
    up, up_bias, down, down_bias = experts
    expert, num_tokens = spec.expert, x.shape[0]
    of_row = jnp.repeat(choice.experts[: choice.most_blocks], num_tokens)
    is_plain = expert.gated and up_bias is None and not (expert.clamped or expert.sparsity) and expert.gate_multiplier == 1.0
    if is_plain and expert.activation in IN_KERNELS:
        hidden = few_experts.multiply(x, up, choice, ACTIVATIONS[expert.activation])
    else:
        hidden = few_experts.multiply(x, up, choice)
        if up_bias is not None:
            hidden += up_bias[of_row]
        hidden = activate(expert, hidden.reshape(hidden.shape[0], -1, expert.dim))
    out = few_experts.multiply(hidden, down, choice)
    if down_bias is not None:
        out += down_bias[of_row]
    token = jnp.arange(num_tokens)[:, None]
    place = jnp.where(choice.blocks < 0, out.shape[0], choice.blocks * num_tokens + token)
    parts = out.at[place].get(mode="fill", fill_value=0)  # [T, k, D]
    return jnp.sum(parts * choice.weights.astype(x.dtype)[..., None], axis=1)
