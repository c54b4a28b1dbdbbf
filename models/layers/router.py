"""Which experts a token goes to, and how much each of them counts. Computed in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.models.spec import RouterSpec

Routes = tuple[Float[Array, "T k"], Int[Array, "T k"]]
"""Weight and number of each token's experts."""


def route(logits: Float[Array, "T E"], spec: RouterSpec, top_k: int, choice_bias: Float[Array, " E"] | None = None) -> Routes:
    """Chooses top_k experts for each token.

    Args:
        logits: of the router, in float32.
        choice_bias: added to the scores for the choice alone.
    """
    if spec.scores == "sparsemixer":
        return _sparsemixer(logits, spec.jitter)
    scores, choice = score(logits, spec, choice_bias)
    experts = jax.lax.top_k(choice, top_k)[1]
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if spec.normalize:
        weights /= jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True) + spec.norm_eps, spec.norm_min)
    return weights * spec.scale, experts


def shaped(logits: Float[Array, "T E"], spec: RouterSpec, bias: Float[Array, " E"] | None) -> Float[Array, "T E"]:
    """What the router's product becomes before it is scored."""
    if bias is not None:
        logits += bias.astype(jnp.float32)
    if spec.logit_multiplier != 1.0:
        logits *= spec.logit_multiplier
    if spec.logit_softcap is not None:
        logits = spec.logit_softcap * jnp.tanh(logits / spec.logit_softcap)
    return logits


def score(
    logits: Float[Array, "T E"], spec: RouterSpec, choice_bias: Float[Array, " E"] | None = None
) -> tuple[Float[Array, "T E"], Float[Array, "T E"]]:
    """Each expert's score, which weighs it, and by what it is chosen; see route."""
    scores = jax.nn.sigmoid(logits) if spec.scores == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    choice = scores if choice_bias is None else scores + choice_bias.astype(jnp.float32)
    return scores, _keep_best_groups(choice, spec) if spec.top_groups < spec.num_groups else choice


def _keep_best_groups(choice: Float[Array, "T E"], spec: RouterSpec) -> Float[Array, "T E"]:
    """No expert outside the best groups is chosen (node-limited routing of https://arxiv.org/abs/2405.04434)."""
    grouped = choice.reshape(choice.shape[0], spec.num_groups, -1)
    best = jax.lax.top_k(grouped, 2 if spec.group_score == "best_two" else 1)[0].sum(-1)
    groups = jax.lax.top_k(best, spec.top_groups)[1]
    kept = jnp.any(jnp.arange(spec.num_groups)[:, None] == groups[:, None, :], axis=-1)  # [T, groups]
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(choice.shape)


def _sparsemixer(logits: Float[Array, "T E"], jitter: float) -> Routes:
    """The best expert weighs its softmax share among those near it; the second one the same, among the others."""

    def best(candidates: Array) -> tuple[Array, Array]:
        expert = jnp.argmax(candidates, axis=-1, keepdims=True)
        top = jnp.take_along_axis(candidates, expert, axis=-1)
        far = (top - logits) / jnp.maximum(jnp.abs(logits), top) > 2 * jitter
        shares = jax.nn.softmax(jnp.where(far, -jnp.inf, candidates), axis=-1)
        return jnp.take_along_axis(shares, expert, axis=-1), expert

    first_weight, first = best(logits)
    second_weight, second = best(jnp.where(jnp.arange(logits.shape[-1]) == first, -jnp.inf, logits))
    return jnp.concatenate((first_weight, second_weight), -1), jnp.concatenate((first, second), -1)
