"""The least time that steps can take on TPUs: a model on paper, from what compiled programs report and public sheets of the chips.

usage: python bench/tpu_floor.py [--count]

--count compiles a decode step of one and of two layers of each model for each number of devices (minutes; needs libtpu, no TPU)
into results/tpu_counts.json: their difference is what a layer takes. Without it, only tpu/PERFORMANCE.md is written anew.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
COUNTS = ROOT / "bench" / "results" / "tpu_counts.json"
DOCUMENT = ROOT / "tpu" / "PERFORMANCE.md"

MODELS = ("llama-3.1-8b", "llama-3.1-70b")
DEVICES = {1: "v6e:2x2", 2: "v6e:2x2", 4: "v6e:2x2", 8: "v6e:2x4", 16: "v6e:4x4"}
ROWS, CONTEXT, PROMPT = 64, 1024, 2048  # of the decode step, and of the prefill
BYTES = 2  # bf16


@dataclass(frozen=True)
class Chip:
    """A device as jax counts them; a tpu7x chip is two. flops and bytes a second, links in one direction."""

    name: str
    flops: float
    bandwidth: float
    memory: float
    links: float


CHIPS = (
    Chip("v5e", 197e12, 819e9, 16e9, 200e9),
    Chip("v5p", 459e12, 2765e9, 95e9, 600e9),
    Chip("v6e", 918e12, 1640e9, 32e9, 400e9),
    Chip("tpu7x", 2307e12 / 2, 7380e9 / 2, 96e9, 600e9 / 2),
)


@dataclass(frozen=True)
class Counts:
    """What a part of a decode step of ROWS rows takes on each device, attention left out.

    Attributes:
        flops: as XLA counts them.
        weights: bytes of all arguments that stay, without the embedding table, of which a step only reads rows.
        summed, gathered: bytes of the results of all-reduces and all-gathers.
    """

    flops: float
    weights: float
    summed: float
    gathered: float

    def plus(self, times: float, other: Counts) -> Counts:
        """self + times * other."""
        return Counts(**{name: value + times * asdict(other)[name] for name, value in asdict(self).items()})


def config_of(model: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((ROOT / "bench" / "models" / model / "config.json").read_text())
    return config


def count_all() -> dict[str, Any]:
    """{model: {devices: {part: Counts}}}"""
    return {model: {str(devices): count(model, devices) for devices in DEVICES} for model in MODELS}


def count(model: str, devices: int) -> dict[str, dict[str, float]]:
    """Of all the layers, and of the ends: embedding and logits."""
    one, two = (_count_cut(model, devices, n) for n in (1, 2))
    print(f"counted {model} on {devices}", flush=True)
    layer = two.plus(-1, one)
    layers = layer.plus(config_of(model)["num_hidden_layers"] - 1, layer)
    return {"layers": asdict(layers), "ends": asdict(one.plus(-1, layer))}


def _count_cut(model: str, devices: int, layers: int) -> Counts:
    from jaxserve.compiling import compile_program
    from jaxserve.config import EngineConfig
    from jaxserve.programs import declare_programs
    from jaxserve.tpu.compile import plan_for
    from jaxserve.tpu.target import open_target

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config_of(model) | {"num_hidden_layers": layers}))
        config = EngineConfig.from_options(
            model=folder,
            load_format="dummy",
            tensor_parallel_size=devices,
            max_model_len=8192,
            max_num_seqs=ROWS,
            num_gpu_blocks_override=256,
        )
        build = plan_for(config, open_target(f"tpu:{DEVICES[devices]}"))
    programs = {program.name: program for program in declare_programs(build.inputs(), build.model.apply, build.runtime)}
    embedding = config_of(model)["vocab_size"] * config_of(model)["hidden_size"] * BYTES / devices
    return _read(compile_program(programs[f"decode {ROWS}"], build.runtime)[0], embedding)


def _read(compiled: Any, embedding: float) -> Counts:
    memory, text = compiled.memory_analysis(), compiled.as_text()
    weights = memory.argument_size_in_bytes - memory.alias_size_in_bytes - embedding
    return Counts(
        compiled.cost_analysis()["flops"], weights, _result_bytes(text, "all-reduce"), _result_bytes(text, "all-gather")
    )


def _result_bytes(text: str, kind: str) -> float:
    """Of every array that an operation of that kind gives; where it is asynchronous, where it ends."""
    total = 0.0
    for line in text.splitlines():
        if match := re.search(rf"= (.*?) {kind}(?:-done)?\(", line):
            for dtype, shape in re.findall(r"(bf16|f32)\[([\d,]*)\]", match[1]):
                size = 2 if dtype == "bf16" else 4
                for n in shape.split(","):
                    size *= int(n)
                total += size
    return total


@dataclass(frozen=True)
class Floor:
    """Seconds that a step takes at least on each device, by what takes them; bytes that must fit."""

    reading: float
    computing: float
    talking: float
    held: float

    @property
    def seconds(self) -> float:
        """Reading and computing overlap, talking waits for them."""
        return max(self.reading, self.computing) + self.talking

    @property
    def bound(self) -> str:
        return "memory" if self.reading > self.computing else "compute"


def floor(chip: Chip, model: str, devices: int, counts: dict[str, Any], rows: int, *, prefill: bool) -> Floor:
    """A step of `rows` tokens: one each of requests with CONTEXT keys, or one prompt.

    Attention is the one part that XLA does not count; here it reads each key and value once, and computes what it must.
    """
    config = config_of(model)
    layers, head_dim = (
        config["num_hidden_layers"],
        config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
    )
    heads, kv_heads = config["num_attention_heads"] / devices, max(config["num_key_value_heads"] / devices, 1)
    pairs = rows * rows / 2 if prefill else rows * CONTEXT
    keys = rows if prefill else rows * CONTEXT
    kv_bytes = keys * 2 * kv_heads * head_dim * BYTES * layers
    inner, ends = Counts(**counts["layers"]), Counts(**counts["ends"])
    sampled = 1 if prefill else rows  # logits are made of these alone
    flops = (inner.flops * rows + ends.flops * sampled) / ROWS + 4 * heads * head_dim * pairs * layers
    told = (2 * (inner.summed + ends.summed) * rows + ends.gathered * sampled) / ROWS * (devices - 1) / devices
    weights = inner.weights + ends.weights
    return Floor(
        reading=(weights + kv_bytes) / chip.bandwidth,
        computing=flops / chip.flops,
        talking=told / chip.links,
        held=weights + kv_bytes,
    )


PUBLISHED = (
    (
        "tpu7x",
        "llama-3.1-70b",
        8,
        128,
        30.8,
        "sglang-jax cookbook: Llama-3.3-70B, 4 chips, 1,024 in and out, 128 at once: time per output token",
    ),
    (
        "tpu7x",
        "llama-3.1-8b",
        8,
        128,
        14.1,
        "sglang-jax cookbook: Qwen3-8B (8.2 B parameters), 4 chips, 1,024 in and out, 128 at once: time per output token",
    ),
    (
        "v6e",
        "llama-3.1-8b",
        4,
        64,
        11.1,
        "sglang-jax cookbook: Qwen3-8B, v6e-4, 1,024 in and out, 64 at once: inter-token latency",
    ),
    (
        "v6e",
        "llama-3.1-8b",
        4,
        256,
        30.0,
        "sglang-jax cookbook: Qwen3-8B, v6e-4, 1,024 in and out, 256 at once: inter-token latency",
    ),
    (
        "v5e",
        "llama-3.1-8b",
        8,
        128,
        128 / 8249 * 1e3,
        "jetstream-pytorch 160: Llama 3 8B, v5e-8, 1,024 in and out, 128 at once, 8,249 tokens/s: 128 / 8,249",
    ),
)

HEAD = f"""# What TPUs could do at best

**A model on paper, not a measurement: jaxserve has never run on a TPU.** Written by [bench/tpu_floor.py](../bench/tpu_floor.py)
from what XLA reports of the programs that it compiles for v6e (operations, bytes of the arguments, results of the sums over
devices), and from the chips' public sheets. A step takes at least the longer of two times: to read its weights and keys once at
the memory's full bandwidth, and to compute at the matrix units' peak in bf16. To that comes what devices tell each other, at
the full bandwidth of all links, without latency. Real steps take longer: kernels have been published that reach 86 % of the
bandwidth in decode and 73 % of the peak in prefill (ragged paged attention on TPU7x, arXiv 2604.15464).

- decode: {ROWS} requests with {CONTEXT:,} tokens of context each, ms a step
- prefill: one prompt of {PROMPT:,} tokens, thousands of tokens/s
- m: bound by memory, c: by compute; -: weights and keys do not fit
- devices are jax's: a tpu7x chip is two

| device | TFLOP/s | GB/s | GB | links, GB/s each way |
|---|---|---|---|---|
"""


def render(counts: dict[str, Any]) -> str:
    lines = [
        f"| {c.name} | {c.flops / 1e12:,.0f} | {c.bandwidth / 1e9:,.0f} | {c.memory / 1e9:.0f} | {c.links / 1e9:.0f} |"
        for c in CHIPS
    ]
    text = HEAD + "\n".join(lines) + "\n"
    for model in MODELS:
        text += f"\n## {model}, bf16\n\n| | " + " | ".join(f"{n} device{'s' * (n > 1)}" for n in DEVICES) + " |\n"
        text += "|---" * (len(DEVICES) + 1) + "|\n"
        for chip in CHIPS:
            for name, prefill in (("decode", False), ("prefill", True)):
                cells = [_cell(chip, model, n, counts[model][str(n)], prefill) for n in DEVICES]
                text += f"| {chip.name} {name} | " + " | ".join(cells) + " |\n"
    text += "\n## Beside what others have published\n\n| | published, ms a step | floor, ms | floor / published |\n|---|---|---|---|\n"
    for name, model, devices, rows, published, source in PUBLISHED:
        chip = next(chip for chip in CHIPS if chip.name == name)
        least = floor(chip, model, devices, counts[model][str(devices)], rows, prefill=False).seconds * 1e3
        text += f"| {source} | {published:.1f} | {least:.1f} | {least / published:.0%} |\n"
    return text + (
        f"\nThe floors are those of {MODELS[0]} and {MODELS[1]} with {CONTEXT:,} tokens of context; the published runs start there and end at "
        "twice as many,\nand share their steps with prefill. So the last column says how much room a step has, not how good an engine is. tpu-inference has\n"
        "published ratios alone: 3.6 (Llama-3.1-8B, v6e-1) and 2.1 (70B, v6e-8) times vLLM's prototype of February 2025.\n"
    )


def _cell(chip: Chip, model: str, devices: int, counts: dict[str, Any], prefill: bool) -> str:
    least = floor(chip, model, devices, counts, PROMPT if prefill else ROWS, prefill=prefill)
    if least.held > 0.9 * chip.memory:
        return "-"
    value = f"{PROMPT / least.seconds / 1e3:,.1f}" if prefill else f"{least.seconds * 1e3:.2f}"
    return f"{value} {least.bound[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", action="store_true", help="compile anew")
    if parser.parse_args().count:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        COUNTS.write_text(json.dumps(count_all(), indent=1) + "\n")
    DOCUMENT.write_text(render(json.loads(COUNTS.read_text())))


if __name__ == "__main__":
    main()
