"""How much KV memory sharing saves: pages held by parallel samples and by beams, against the sum of what each would hold alone.

usage: python bench/sharing.py [--model MODEL] [--traces NAME ...] [--out FILE]

Prompts are pieces of English text (the Python language reference, which every Python brings), of lengths drawn with a fixed seed
to resemble Alpaca's and ShareGPT's; outputs have the drawn length (EOS ignored). A prompt is submitted when there are slots for
all its samples or beams. After each step is planned: pages held, and pages that the running requests would hold without sharing.
saved = 1 - sum(held) / sum(without) over all steps, as in the PagedAttention paper (section 6.3, figure 15). The prefix cache is
off, so that only one prompt's own samples and beams share.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

SEED = 0
NUM_PROMPTS = 32
WIDTHS = (2, 4, 6)
SLOTS = 48
PAPER = {
    "alpaca, samples": "6.1 to 9.8 %", "sharegpt, samples": "16.2 to 30.5 %",
    "alpaca, beams": "37.6 to 55.2 %", "sharegpt, beams": "44.3 to 66.3 %",
}  # fmt: skip


@dataclass(frozen=True)
class Trace:
    """Lengths in tokens: log-normal around a mean, cut to a range. The means are the paper's, but for ShareGPT's output (338)."""

    mean_in: int
    mean_out: int
    sigma: float
    low: int
    high_in: int
    high_out: int

    def lengths(self) -> list[tuple[int, int]]:
        rng = np.random.default_rng(SEED)

        def draw(mean: int, high: int) -> list[int]:
            drawn = rng.lognormal(np.log(mean) - self.sigma**2 / 2, self.sigma, NUM_PROMPTS)
            return np.clip(np.round(drawn), self.low, high).astype(int).tolist()

        return list(zip(draw(self.mean_in, self.high_in), draw(self.mean_out, self.high_out), strict=True))


TRACES = {
    "alpaca": Trace(mean_in=19, mean_out=58, sigma=0.6, low=4, high_in=64, high_out=128),
    "sharegpt": Trace(mean_in=161, mean_out=80, sigma=0.8, low=8, high_in=384, high_out=96),
}


def prompts_of(tokenizer: Any, lengths: list[int]) -> list[list[int]]:
    """A piece of text for each length; no two overlap."""
    from pydoc_data.topics import topics

    tokens = tokenizer.encode("\n".join(topics[name] for name in sorted(topics)), add_special_tokens=False)
    starts = np.random.default_rng(SEED).permutation(len(tokens) // max(lengths) - 1)[: len(lengths)] * max(lengths)
    return [tokens[start : start + n] for start, n in zip(starts.tolist(), lengths, strict=True)]


def measure(engine: Any, trace: Trace, *, beams: bool, width: int) -> dict[str, Any]:
    """One run: every prompt with `width` samples or beams."""
    from jaxserve import OutputKind, SamplingParams

    lengths = trace.lengths()
    work = list(enumerate(zip(prompts_of(engine.tokenizer, [n for n, _ in lengths]), lengths, strict=True)))
    held = without = steps = num_open = 0
    start = time.perf_counter()
    while work or num_open:
        while work and (num_open + 1) * width <= SLOTS:
            i, (prompt, (_, out)) = work.pop(0)
            params = SamplingParams(
                n=width, use_beam_search=beams, temperature=1.0, seed=i, max_tokens=out, ignore_eos=True, detokenize=False,
                output_kind=OutputKind.FINAL_ONLY,
            )  # fmt: skip
            engine.add_request(prompt, params)
            num_open += 1
        engine.dispatch()
        held += engine.scheduler.pool.num_held
        without += sum(len(list(request.table.held)) for request in engine.scheduler.running)
        steps += 1
        num_open -= sum(output.finished for output in engine.collect())
        engine.check_integrity()
    assert engine.scheduler.num_preemptions == 0, "the pool is too small: what is computed again is not shared any more"
    return {
        "saved_percent": round(100 * (1 - held / without), 1),
        "mean_pages_held": round(held / steps, 1),
        "mean_pages_without": round(without / steps, 1),
        "steps": steps,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--traces", nargs="+", choices=list(TRACES), default=list(TRACES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sharing.json")
    args = parser.parse_args()

    import jax

    from jaxserve import LLM

    options = {"max_num_seqs": SLOTS, "max_num_batched_tokens": 256, "max_model_len": 512, "num_gpu_blocks_override": 1536}
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "model": args.model,
        "options": options,
        "num_prompts": NUM_PROMPTS,
        "traces": {name: asdict(trace) for name, trace in TRACES.items()},
        "paper_saved": PAPER,
        "runs": [],
    }
    with LLM(args.model, enable_prefix_caching=False, **options) as llm:
        result["page_size"] = llm.engine.scheduler.page_size
        for name in args.traces:
            trace = TRACES[name]
            for beams in (False, True):
                for width in WIDTHS:
                    run = {"trace": name, "method": "beams" if beams else "samples", "width": width}
                    result["runs"].append(run | measure(llm.engine, trace, beams=beams, width=width))
                    print(result["runs"][-1], flush=True)
                    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
