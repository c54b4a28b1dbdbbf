"""The functional core in a program of your own: a prompt and its continuation as one jit, on a mesh that is yours.

python -m jaxserve.examples.functional_core
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxserve.core import Core, Row, load_core
from jaxserve.plan import ON_DEVICE, PlanShape
from jaxserve.sampling_params import SamplingParams
from jaxserve.sharding import make_mesh
from jaxserve.step import DeviceState, Weights


@partial(jax.jit, static_argnames=("core", "prefill", "decode"), donate_argnames="state")
def run_plans(
    core: Core,
    prefill: PlanShape,
    decode: PlanShape,
    weights: Weights,
    state: DeviceState,
    prompt: Int[Array, " size"],
    steps: Int[Array, "steps size"],
) -> tuple[Int[Array, "steps+1 B"], DeviceState]:
    """One step over the prompts and then one for each further token; no host in between."""
    last_tokens = jnp.zeros(core.num_slots, jnp.int32)
    state, results = core.forward(weights, state, last_tokens, prompt, prefill)
    last_tokens, first = core.sample(results, last_tokens)

    def next_token(
        carry: tuple[DeviceState, Int[Array, " slots"]], packed: Int[Array, " size"]
    ) -> tuple[tuple[DeviceState, Int[Array, " slots"]], Int[Array, " B"]]:
        state, results = core.forward(weights, carry[0], carry[1], packed, decode)
        last_tokens, tokens = core.sample(results, carry[1])
        return (state, last_tokens), tokens

    (state, _), others = jax.lax.scan(next_token, (state, last_tokens), steps)
    return jnp.concatenate([first[None], others]), state


def generate(
    core: Core, weights: Weights, prompts: Sequence[Sequence[int]], params: SamplingParams, max_tokens: int, seed: int = 0
) -> list[list[int]]:
    """Continues each prompt by max_tokens tokens; prompt i has slot i, seed + i, and pages of its own."""
    per_slot = core.pages_per_slot
    tables = [range(i * per_slot, (i + 1) * per_slot) for i in range(len(prompts))]
    rows = [Row(i, 0, p, tables[i], params, seed + i) for i, p in enumerate(prompts)]
    rows.sort(key=lambda row: len(row.token_ids) > 1)
    prefill = core.shape(sum(map(len, prompts)) + 1, len(prompts))  # as many tokens as rows would mean one for each
    decode = core.shape(len(prompts), len(prompts))
    steps = [
        core.pack([Row(r.slot, len(r.token_ids) + i, [ON_DEVICE], (), params, r.seed) for r in rows], decode)
        for i in range(max_tokens - 1)
    ]
    tokens, _ = run_plans(core, prefill, decode, weights, core.init_state(), core.pack(rows, prefill), np.stack(steps))
    return [np.asarray(tokens)[:, [row.slot for row in rows].index(i)].tolist() for i in range(len(prompts))]


def main() -> None:
    """Continues two prompts with SmolLM2."""
    from jaxserve.models.loading.resolve import resolve_model
    from jaxserve.tokenizer import load_tokenizer

    core, weights = load_core("smollm2", make_mesh(1), num_pages=32, num_slots=2, max_model_len=256)
    tokenizer = load_tokenizer(resolve_model("smollm2"))
    prompts = [tokenizer.encode(text) for text in ("The sky is", "The capital of France is")]
    for tokens in generate(core, weights, prompts, SamplingParams(temperature=0.0), max_tokens=12):
        print(tokenizer.decode(tokens))


if __name__ == "__main__":
    main()
