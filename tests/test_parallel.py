"""Tensor and data parallelism on eight devices: the same tokens as one, and weights that are never whole on any."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxserve import LLM, SamplingParams, build, startup
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.models.families.assembly import Index
from jaxserve.models.loading import describe_model, load_weights, open_source
from jaxserve.models.loading.source import ModelSource
from jaxserve.programs import ProgramReport, Programs
from jaxserve.sharding import Shardings, kv_repeat, make_mesh, make_meshes
from tests.goldens import cases

pytestmark = pytest.mark.usefixtures("nothing_kept_compiled", "quickest_compiles")

HEADS, KV_HEADS, HEAD_DIM, WIDTH, FFN, LAYERS = 8, 2, 8, 32, 48, 2
PROMPTS = [[3, 1, 4, 1, 5, 9], list(range(10, 50)), [7], [60, 61] * 9, list(range(100, 120))]


def write_model(folder: Path, vocab_size: int) -> Path:
    """A Llama of 8 query heads and 2 kv heads."""
    own = {
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "vocab_size": vocab_size,
        "max_position_embeddings": 128,
    }
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab_size, WIDTH),
        "lm_head.weight": (vocab_size, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes |= {layer + f"{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
        shapes |= {layer + f"mlp.{name}_proj.weight": (FFN, WIDTH) for name in ("gate", "up")}
        shapes |= {layer + f"self_attn.{name}_proj.weight": (n, WIDTH) for name, n in (("q", q), ("k", kv), ("v", kv))}
        shapes |= {layer + "mlp.down_proj.weight": (WIDTH, FFN), layer + "self_attn.o_proj.weight": (WIDTH, q)}
    tensors = {name: cases.draw(name, shape) + (len(shape) == 1) for name, shape in shapes.items()}
    return cases.write_checkpoint(folder, "llama", config=cases.read_config("llama") | own, tensors=tensors)


GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)


def generate(model: Path, **options: Any) -> list[list[int]]:
    """The tokens of every prompt; the last two are sampled, with the seeds that requests without one get."""
    params = [GREEDY.with_(temperature=float(i >= len(PROMPTS) - 2)) for i in range(len(PROMPTS))]
    sizes = {"max_num_seqs": 2, "max_num_batched_tokens": 32, "num_gpu_blocks_override": 32}
    with LLM(str(model), skip_tokenizer_init=True, **sizes, **options) as llm:
        outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
        llm.engine.check_integrity()
        return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [((8, 1), (1, 2)), pytest.param(((2, 1), (4, 1), (2, 2)), marks=pytest.mark.extra)])
def test_the_same_tokens_on_any_number_of_devices(sizes: tuple[tuple[int, int], ...], tmp_path: Path) -> None:
    """(tensor_parallel_size, data_parallel_size); 8 devices hold each of the 2 kv heads four times."""
    model = write_model(tmp_path, 160)
    alone = generate(model)
    assert len({tuple(tokens) for tokens in alone}) == len(PROMPTS)
    for tensor, data in sizes:
        assert generate(model, tensor_parallel_size=tensor, data_parallel_size=data) == alone, (tensor, data)


@pytest.mark.extra
def test_a_vocabulary_that_does_not_divide(tmp_path: Path) -> None:
    model = write_model(tmp_path, 161)
    assert generate(model, tensor_parallel_size=2) == generate(model)


def spy(source: ModelSource, reads: dict[str, list[tuple[int, ...]]]) -> ModelSource:
    """Notes the shape of whatever is read of each tensor."""

    class Spied:
        def __init__(self, name: str, tensor: Any) -> None:
            self.name, self.shape, self.tensor = name, tensor.shape, tensor

        def read(self, index: Index) -> np.ndarray:
            part = self.tensor.read(index)
            reads.setdefault(self.name, []).append(part.shape)
            return part

    object.__setattr__(source, "tensors", {name: Spied(name, tensor) for name, tensor in source.tensors.items()})
    return source


@pytest.mark.parametrize("devices", [2, 4])
def test_weights_are_never_whole_on_a_device(devices: int, tmp_path: Path) -> None:
    reads: dict[str, list[tuple[int, ...]]] = {}
    source = spy(open_source(str(write_model(tmp_path, 160))), reads)
    model = describe_model(
        source, dtype=jnp.float32, kv_repeat=lambda heads: kv_repeat(heads, devices), outputs_first=devices == 4
    )
    weights = load_weights(source, model, sharding_for=Shardings(make_mesh(devices)).of)
    for parameter, weight in zip(model.parameters, weights, strict=True):
        sizes = {shard.data.size for shard in weight.addressable_shards}
        is_norm = len(weight.shape) == 1
        assert sizes == {weight.size if is_norm else weight.size // devices}, parameter.path
        assert len(weight.addressable_shards) == devices
    for name, parts in reads.items():
        shape = source.tensors[name].shape
        if len(shape) > 1:
            of_heads = min(devices, KV_HEADS) if ".k_proj" in name or ".v_proj" in name else devices
            assert {prod(part) for part in parts} == {prod(shape) // of_heads}, name
    assert set(reads) == set(source.tensors)


@pytest.mark.parametrize(
    ("axes", "shape", "wanted"),
    [
        (("vocab", "embed"), (160, 32), P("model", None)),
        (("vocab", "embed"), (161, 32), P(None, None)),
        (("embed", None, "ffn"), (32, 2, 48), P(None, None, "model")),
        (("embed", None, "ffn"), (32, 2, 50), P(None, None, None)),
        (("heads", None, "embed"), (8, 8, 32), P("model", None, None)),
        ((None,), (32,), P(None)),
    ],
)
def test_an_axis_that_does_not_divide_is_whole(axes: Sequence[str | None], shape: tuple[int, ...], wanted: P) -> None:
    assert Shardings(make_mesh(4)).of(tuple(axes), shape).spec == wanted


def test_compile_is_for_every_replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meshes: list[list[int]] = []

    def compile_programs(*args: Any, traces: object, threads: int, find_tracers: object) -> Programs:
        runtime, on_progress = args[-2:]
        meshes.append([device.id for device in runtime.mesh.devices.flat])
        on_progress("compile", 1, 1)
        return Programs({}, (ProgramReport("decode 1", 0.2, 0.5, 1, 2),))

    monkeypatch.setattr(build, "compile_programs", compile_programs)
    config = EngineConfig.from_options(model=str(write_model(tmp_path, 160)), tensor_parallel_size=2, data_parallel_size=3)
    stages: list[str] = []
    reports = startup.compile_model(config, on_progress=lambda stage, done, total: stages.append(stage))
    assert meshes == [[0, 1], [2, 3], [4, 5]] and len(reports) == 3
    assert stages == ["compile 1/3", "compile 2/3", "compile 3/3"]


def test_replicas_have_devices_of_their_own() -> None:
    meshes = make_meshes(2, 3)
    assert [d.id for mesh in meshes for d in mesh.devices.flat] == list(range(6))
    with pytest.raises(ConfigError, match="data_parallel_size=3 times tensor_parallel_size=4 is more than the 8 devices"):
        make_meshes(4, 3)
    with pytest.raises(ConfigError, match="tensor_parallel_size is 16, but there are 8"):
        make_meshes(16, 1)
    assert len(jax.devices()) == 8
