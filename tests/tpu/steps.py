"""Programs of whole steps, compiled for devices that are not there."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from jaxserve.build import Build
from jaxserve.compiling import compile_program
from jaxserve.config import EngineConfig
from jaxserve.models.interface import StateSpec
from jaxserve.programs import declare_programs
from jaxserve.tpu.compile import plan_for
from jaxserve.tpu.target import open_target

CHIPS = ["tpu:v5e:2x2", "tpu:v5p:2x2x1", "tpu:v6e:2x2", "tpu:tpu7x:2x2x1"]
MODELS = Path(__file__).parent.parent.parent / "bench" / "models"

SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 4096,
    "max_position_embeddings": 8192,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def write_config(folder: Path, model: str | None = None, **changes: Any) -> str:
    """A model of bench/models, or a small one of four layers."""
    config = SMALL if model is None else json.loads((MODELS / model / "config.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | changes))
    return str(folder)


def plan(model: str, target: str, devices: int = 1, **options: Any) -> Build:
    config = EngineConfig.from_options(model=model, load_format="dummy", tensor_parallel_size=devices, **options)
    return plan_for(config, open_target(target))


def compile_step(build: Build, name: str) -> Any:
    """The program of that name, such as "decode 16"."""
    programs = {program.name: program for program in declare_programs(build.inputs(), build.model.apply, build.runtime)}
    return compile_program(programs[name], build.runtime)[0]


def check_step(build: Build, compiled: Any) -> None:
    """It attends by kernels, and leaves the pools and the layers' weights where they are."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    caches = build.inputs().state.caches
    local = [x.sharding.shard_shape(x.shape) for x in caches]
    pools = [shape for shape, spec in zip(local, build.layout.arrays, strict=True) if not isinstance(spec, StateSpec)]
    held = build.num_pages * build.page_bytes
    assert memory.alias_size_in_bytes >= held, "the pool is not updated in place"
    assert memory.temp_size_in_bytes < held // len(pools), "a layer's pool may have been copied"
    assert not copied_weights(build, text), "weights are copied, as their tiles lie in another way than products take them"
    for shape in set(pools):
        dims = ",".join(map(str, shape))
        assert not re.search(rf"\[{dims}\]\S* (copy|copy-start|transpose|all-gather|all-gather-start)\(", text), (
            "a pool is copied"
        )
    assert "paged_attention_decode" in text


def copied_weights(build: Build, text: str) -> list[str]:
    """What has the size of a layer's large weight and is written to a device's memory; S(1) is VMEM, which costs no more than reading."""
    shapes = (x.sharding.shard_shape(x.shape) for x in build.inputs().weights)
    named = zip(map(math.prod, shapes), build.model.paths, strict=True)
    sizes = {size for size, path in named if path.startswith("layers.") and size > 2**22}
    made = re.findall(r"= \w+\[([\d,]+)\](\S*) (?:copy|reshape|transpose|fusion)\(%param[\w.]*\)", text[text.index("\nENTRY") :])
    return [dims for dims, layout in made if "S(1)" not in layout and math.prod(map(int, dims.split(","))) in sizes]


def count_collectives(text: str) -> dict[str, int]:
    """How often each kind of talk between devices occurs in a program; an asynchronous one counts where it starts."""
    kinds = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
    counts = {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in kinds}
    return {kind: count for kind, count in counts.items() if count}
