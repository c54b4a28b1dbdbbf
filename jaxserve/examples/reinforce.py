"""REINFORCE (Williams, 1992) in one process: the engine samples, the same model trains on the tokens, the engine goes on with that.

    python -m jaxserve.examples.reinforce

A tiny random Llama learns to say even token ids. The arrays that the trainer makes are the ones that the engine samples with.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxserve import LLM, RequestOutput, SamplingParams
from jaxserve.core import Core, load_core
from jaxserve.sharding import make_mesh
from jaxserve.step import Weights

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
PROMPTS = [[1, 2, 3, 4], [9, 8, 7, 6]]
SAMPLES = 16  # of each prompt in a step
NUM_TOKENS = 12  # of each sample
LEARNING_RATE = 0.3


@dataclass(frozen=True)
class StepReport:
    """One training step.

    Attributes:
        reward: mean share of even tokens.
        gap: largest difference between the sampler's log probability of a token and the trainer's.
        weight_version: of the weights that the samples come from.
    """

    reward: float
    gap: float
    weight_version: int


def make_model(folder: Path) -> tuple[LLM, Core]:
    """The tiny model twice: to sample from, and as a function."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    limits = {"max_num_seqs": 2 * SAMPLES, "max_num_batched_tokens": 128, "num_gpu_blocks_override": 128}
    llm = LLM(str(folder), load_format="dummy", skip_tokenizer_init=True, dtype="float32", **limits)
    sizes = {"num_pages": 1, "num_slots": 1, "max_model_len": 64}  # the trainer keeps no state
    core, _ = load_core(str(folder), make_mesh(1), load_format="dummy", dtype="float32", **sizes)
    return llm, core.for_training()


def token_logprobs(core: Core, weights: Weights, tokens: Int[Array, "B L"], num_tokens: int) -> Float[Array, "B O"]:
    """Log probability of each of the last num_tokens tokens after those before it."""
    logprobs = jax.nn.log_softmax(core.logits(weights, tokens)[:, -num_tokens - 1 : -1])
    return jnp.take_along_axis(logprobs, tokens[:, -num_tokens:, None], axis=-1)[..., 0]


@partial(jax.jit, static_argnames="core")  # nothing is donated: the engine still holds the weights
def train_step(
    core: Core, weights: Weights, tokens: Int[Array, "B L"], rewards: Float[Array, " B"], sampled: Float[Array, "B O"]
) -> tuple[Weights, Float[Array, ""]]:
    """New weights, and the largest difference between the sampler's log probabilities and the trainer's."""

    def loss(weights: Weights) -> tuple[Float[Array, ""], Float[Array, "B O"]]:
        logprobs = token_logprobs(core, weights, tokens, sampled.shape[1])
        return -jnp.mean((rewards - rewards.mean()) * logprobs.sum(axis=1)), logprobs

    gradient, logprobs = jax.grad(loss, has_aux=True)(weights)
    updated = jax.tree.map(lambda w, g: w - LEARNING_RATE * g, weights, gradient)
    return updated, jnp.max(jnp.abs(logprobs - sampled))


def train(llm: LLM, core: Core, num_steps: int) -> Iterator[StepReport]:
    """Samples, rewards and learns, over and over."""
    names = [parameter.path for parameter in core.model.parameters]
    for step in range(num_steps):
        params = SamplingParams(n=SAMPLES, seed=step * SAMPLES, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
        tokens, sampled = _arrays(outputs)
        rewards = (tokens[:, -NUM_TOKENS:] % 2 == 0).mean(axis=1).astype(np.float32)
        weights = tuple(llm.params[name] for name in names)
        weights, gap = train_step(core, weights, jnp.asarray(tokens), jnp.asarray(rewards), jnp.asarray(sampled))
        llm.update_params(dict(zip(names, weights, strict=True)))
        yield StepReport(float(rewards.mean()), float(gap), outputs[0].weight_version)


def _arrays(outputs: list[RequestOutput]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, L] of prompts and samples, and the sampler's log probabilities [B, O] of the samples."""
    samples = [(output.prompt_token_ids, completion) for output in outputs for completion in output.outputs]
    tokens = [prompt + completion.token_ids for prompt, completion in samples]
    logprobs = [
        [entries[token].logprob for token, entries in zip(c.token_ids, c.logprobs or (), strict=True)] for _, c in samples
    ]
    return np.array(tokens, np.int32), np.array(logprobs, np.float32)


def main() -> None:
    """Prints a line a step."""
    with tempfile.TemporaryDirectory() as folder:
        llm, core = make_model(Path(folder))
        with llm:
            for number, report in enumerate(train(llm, core, 30)):
                print(f"step {number:2}: {report.reward:.0%} even; sampler and trainer differ by {report.gap:.1e} at most")


if __name__ == "__main__":
    main()
