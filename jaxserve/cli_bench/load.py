"""how fast weights get from a safetensors file to the devices

Writes a made-up Llama checkpoint in bfloat16 and loads it (in bfloat16 too, unless told), beside reading the same bytes with as
many threads and doing nothing with them. The files are in the page cache both times, so this is about the work, not the disk.
Host memory is what the process holds beyond its start, without mapped files; on a CPU the weights themselves are host memory,
and are counted apart.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

CHUNK_BYTES = 16 * 2**20
MAX_SHARD_BYTES = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gb", type=float, default=2.0, help="size of the checkpoint in 10^9 bytes (default: 2)")
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoint is written and then removed (default: a temporary folder)"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights as they are held")
    parser.add_argument("--repeats", type=int, default=3, help="the best of so many loads counts (default: 3)")


def run(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        num_bytes = write_checkpoint(Path(folder), args.gb)
        read_bytes(Path(folder))  # into the page cache
        read_s = min(read_bytes(Path(folder)) for _ in range(args.repeats))
        loads = [load(Path(folder), args.dtype) for _ in range(args.repeats)]
    best = min(loads, key=lambda found: found["seconds"])
    result = {
        "gb": round(num_bytes / 1e9, 3),
        "read_gb_s": float(f"{num_bytes / read_s / 1e9:.3g}"),
        "load_gb_s": float(f"{num_bytes / best['seconds'] / 1e9:.3g}"),
        "load_to_read": float(f"{read_s / best['seconds']:.3g}"),
        "peak_host_gb": round(max(found["peak_bytes"] for found in loads) / 1e9, 3),
        "peak_host_without_weights_gb": round(max(found["peak_bytes"] - found["host_weights"] for found in loads) / 1e9, 3),
        "device": best["device"],
        "dtype": args.dtype,
        "threads": _num_threads(),
    }
    print(json.dumps(result, indent=1))


def write_checkpoint(folder: Path, gb: float) -> int:
    """Writes a Llama model of about that size in shards; returns its bytes."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    width = 2048 if gb >= 1 else 256
    ffn, vocab, heads = 4 * width, 8 * width, 16
    layer: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    layer |= {"mlp.gate_proj": (ffn, width), "mlp.up_proj": (ffn, width), "mlp.down_proj": (width, ffn)}
    layer |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    outer = {"model.embed_tokens.weight": (vocab, width), "lm_head.weight": (vocab, width), "model.norm.weight": (width,)}
    layer_bytes = 2 * sum(int(np.prod(shape)) for shape in layer.values())
    num_layers = max(1, round((gb * 1e9 - 4 * vocab * width) / layer_bytes))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "intermediate_size": ffn,
        "num_hidden_layers": num_layers, "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": vocab,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes = outer | {f"model.layers.{i}.{name}.weight": shape for i in range(num_layers) for name, shape in layer.items()}
    block = np.random.default_rng(0).standard_normal(max(int(np.prod(s)) for s in shapes.values()), np.float32)
    values = block.astype(ml_dtypes.bfloat16)
    shards: list[dict[str, Any]] = [{}]
    for name, shape in shapes.items():
        if sum(tensor.nbytes for tensor in shards[-1].values()) > MAX_SHARD_BYTES:
            shards.append({})
        shards[-1][name] = values[: int(np.prod(shape))].reshape(shape)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = f"model-{number:05}.safetensors"
        save_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def read_bytes(folder: Path) -> float:
    """Seconds to read every byte of the checkpoint, and no more."""
    work = [(path, at) for path in sorted(folder.glob("*.safetensors")) for at in range(0, path.stat().st_size, CHUNK_BYTES)]
    buffers = threading.local()

    def read(path: Path, at: int) -> None:
        if not hasattr(buffers, "chunk"):
            buffers.chunk = bytearray(CHUNK_BYTES)
        with path.open("rb", buffering=0) as file:
            file.seek(at)
            file.readinto(buffers.chunk)

    started_s = time.perf_counter()
    with ThreadPoolExecutor(_num_threads()) as pool:
        list(pool.map(lambda item: read(*item), work))
    return time.perf_counter() - started_s


def load(folder: Path, dtype: str) -> dict[str, Any]:
    """Seconds and peak host memory of a load."""
    import jax
    import jax.numpy as jnp

    from jaxserve.models.loading import describe_model, load_weights, open_source
    from jaxserve.sharding import Shardings, make_mesh

    device, to, before = jax.devices()[0], Shardings(make_mesh(1)), _host_bytes()
    with _Peak() as peak:
        started_s = time.perf_counter()
        source = open_source(str(folder))
        model = describe_model(source, dtype=jnp.dtype(dtype), outputs_first=device.platform == "cpu")
        weights = jax.block_until_ready(load_weights(source, model, sharding_for=to.of))
        seconds = time.perf_counter() - started_s
    held = sum(w.nbytes for w in weights) if device.platform == "cpu" else 0
    for weight in weights:
        weight.delete()
    return {"seconds": seconds, "peak_bytes": peak.bytes - before, "host_weights": held, "device": device.device_kind}


class _Peak:
    """Watches the process's own memory while it is open.

    Attributes:
        bytes: the most that was seen.
    """

    def __enter__(self) -> Self:
        self.bytes = _host_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, _host_bytes())


def _host_bytes() -> int:
    """What the process holds that is no file."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def _num_threads() -> int:
    return min(8, os.cpu_count() or 1)
