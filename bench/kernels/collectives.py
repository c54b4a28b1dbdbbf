"""All-reduces and the gathering of logits on two GPUs: PYTHONPATH=. python bench/kernels/collectives.py --out FILE [--budget-s 150].

One program of 64 all-reduces of [rows, 4096] in bfloat16, each of what a small matmul (or none) gives, for each way of doing it:
ms a call back to back and one at a time, what the host takes to send one, and from a trace what kernels and gaps take. Each phase is
a process of its own with a limit, since a kernel that waits for ever must not take the rest with it.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WIDTH, INNER, COUNT = 4096, 256, 64
USUAL = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL"
NCCL = {"xla_gpu_experimental_use_collective_kernels": ""}
WAYS: dict[str, dict[str, Any]] = {
    "own": {},
    "none": {},
    "xla": {},
    "nccl": NCCL,
    "nccl_graph": NCCL | {"xla_gpu_enable_command_buffer": f"{USUAL},COLLECTIVES"},
}
# Phase -> (ways, environment, limit in seconds). In "kept", graphs whose temporary memory stays where it was are not recorded anew.
PHASES: dict[str, tuple[tuple[str, ...], dict[str, str], float]] = {
    "gather": ((), {}, 30),
    "own": (("own", "none"), {}, 30),
    "xla": (("xla", "nccl_graph", "nccl"), {}, 40),
    "kept": (("nccl_graph",), {"XLA_FLAGS": "--xla_gpu_command_buffer_update_mode=SKIP_TEMP"}, 25),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=150)
    parser.add_argument("--only", default=",".join(PHASES))
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase is not None:
        measure_phase(args.phase, args.out, time.monotonic() + args.budget_s)
        return
    until_s, found = time.monotonic() + args.budget_s, {}
    for name in args.only.split(","):
        left_s = min(PHASES[name][2], until_s - time.monotonic())
        if left_s > 8:
            found[name] = run(name, args.out.with_suffix(f".{name}"), left_s)
            args.out.write_text(json.dumps(found, indent=1) + "\n")


def run(name: str, part: Path, limit_s: float) -> dict[str, Any]:
    """A phase in a process of its own; what it had found when it ended or was ended."""
    # NVLink multicast stays off: a program that uses it can put a shared host's GPUs out of service.
    environment = {**os.environ, "NCCL_NVLS_ENABLE": "0", **PHASES[name][1]}
    environment["XLA_FLAGS"] = " ".join(
        flags for flags in (os.environ.get("XLA_FLAGS"), PHASES[name][1].get("XLA_FLAGS")) if flags
    )
    command = [sys.executable, *sys.argv[:1], "--phase", name, "--out", str(part), "--budget-s", str(limit_s - 6)]
    started_s = time.monotonic()
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        ended = f"code {process.wait(limit_s)}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        ended = f"killed after {limit_s:.0f} s"
    lines = part.read_text().splitlines() if part.exists() else []
    part.unlink(missing_ok=True)
    print(f"== {name}: {ended}, {time.monotonic() - started_s:.0f} s", flush=True)
    return {"ended": ended, "cases": [json.loads(line) for line in lines]}


def cases(ways: tuple[str, ...]) -> Iterator[tuple[str, int, bool, bool]]:
    """(way, rows, behind a matmul, donated), the most telling first."""
    yield from ((way, 64, True, False) for way in ways)
    for way in ways[:4]:
        yield from [(way, 64, True, True), (way, 16, True, False), (way, 256, True, False)]
        yield way, 64, False, False


def measure_gather(out: Path) -> None:
    """Logits that have all columns on both GPUs, by rows: microseconds each of eight, beside the same without."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from jaxserve.pallas_kernels.collectives import all_gather
    from jaxserve.pallas_kernels.collectives.peers import lend

    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    _lent, table = lend(mesh, 256 * 128_256 * 4)
    with out.open("w") as file:
        for rows in (1, 16, 64, 256):
            x = jax.device_put(
                np.random.default_rng(0).random((rows, 128_256), np.float32), NamedSharding(mesh, P(None, "model"))
            )
            times, digests = {}, {}
            for way in ("none", "xla", "own"):

                def program(x: Any, table: Any, way: str = way) -> Any:
                    for _ in range(8):
                        peers = table if way == "own" else None
                        y = jnp.concatenate((x, x), 1) if way == "none" else all_gather(x, peers, "model")
                        x = x / 2 + y[:, ::2]
                    return x

                specs = {"in_specs": (P(None, "model"), P("model")), "out_specs": P(None, "model"), "check_vma": False}
                compiled = jax.jit(jax.shard_map(program, mesh=mesh, **specs)).lower(x, table).compile()
                digests[way] = float(compiled(x, table).sum())
                for _ in range(3):
                    start = time.perf_counter()
                    for _ in range(10):
                        y = compiled(x, table)
                    y.block_until_ready()
                    times[way] = round((time.perf_counter() - start) / 80 * 1e6, 1)
            line = json.dumps({"way": "gather", "rows": rows, "us_each": times, "digests": digests})
            print(line, flush=True)
            file.write(line + "\n")


def measure_phase(name: str, out: Path, until_s: float) -> None:
    if name == "gather":
        measure_gather(out)
        return
    with out.open("w") as file:
        for way, rows, matmul, donated in cases(PHASES[name][0]):
            if time.monotonic() > until_s:
                return
            known = {"way": way, "rows": rows, "matmul": matmul, "donated": donated}
            try:
                found = measure(way, rows, matmul, donated, is_traced=matmul and not donated and rows == 64)
            except Exception as e:  # noqa: BLE001  the others are still worth measuring
                found = {"error": f"{type(e).__name__}: {str(e)[:300]}"}
            print(name, json.dumps(known | found), flush=True)
            file.write(json.dumps(known | found) + "\n")
            file.flush()


def measure(way: str, rows: int, matmul: bool, donated: bool, *, is_traced: bool, calls: int = 30) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    is_gpu = jax.devices()[0].platform == "gpu"
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    whole, cut = NamedSharding(mesh, P()), NamedSharding(mesh, P("model"))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, WIDTH), np.float32).astype(jnp.bfloat16)
    w = (rng.standard_normal((2 * INNER, WIDTH), np.float32) / 64).astype(jnp.bfloat16)
    table = np.zeros((2, 3, 2), np.int32)
    if way.startswith("own"):
        from jaxserve.pallas_kernels.collectives.mosaic_gpu_all_reduce import all_reduce
        from jaxserve.pallas_kernels.collectives.peers import lend

        _lent, table = lend(mesh)

    def program(x: Any, w: Any, table: Any) -> Any:
        for _ in range(COUNT):
            part = x[:, :INNER] @ w if matmul else x * w[0]
            if way.startswith("own"):
                part = all_reduce(part, table)
            elif way != "none":
                part = jax.lax.psum(part, "model")
            x = part + x / 2
        return x

    cut_up = jax.shard_map(program, mesh=mesh, in_specs=(P(), P("model"), P("model")), out_specs=P(), check_vma=False)
    jitted = jax.jit(cut_up, donate_argnums=(0,) if donated else (), out_shardings=whole)
    options = WAYS[way] | {"xla_gpu_autotune_level": 0, "xla_enable_command_buffers_during_profiling": True}
    arguments = [jax.device_put(x, whole), jax.device_put(w, cut), jax.device_put(table, cut)]
    started_s = time.perf_counter()
    compiled = jitted.lower(*arguments).compile(compiler_options=options if is_gpu else {})
    found: dict[str, Any] = {"compile_s": round(time.perf_counter() - started_s, 1)}
    first = compiled(*arguments)
    found["digest"] = round(float(jnp.abs(first.astype(jnp.float32)).mean()), 6)  # the same of all ways, nearly
    shards = [np.asarray(shard.data).view(np.uint16) for shard in first.addressable_shards]
    found["same_bits"] = bool(all((shard == shards[0]).all() for shard in shards))
    x, w, table = first, *arguments[1:]

    def loop(count: int, *, waits: bool = False) -> tuple[float, float]:
        nonlocal x
        start = time.perf_counter()
        for _ in range(count):
            x = compiled(x, w, table)
            if waits:
                x.block_until_ready()
        sent = time.perf_counter() - start
        x.block_until_ready()
        return (time.perf_counter() - start) / count * 1000, sent / count * 1000

    loop(5)
    found["ms"], found["sending_ms"] = (round(v, 3) for v in min(loop(calls), loop(calls)))
    found["waiting_ms"] = round(loop(calls, waits=True)[0], 3)
    found["us_each"] = round(found["ms"] * 1000 / COUNT, 2)
    if is_traced and is_gpu:
        with tempfile.TemporaryDirectory() as trace:
            with jax.profiler.trace(trace):
                loop(4)
            found |= read_trace(trace, 4)
    return found


def read_trace(trace: str, calls: int) -> dict[str, Any]:
    """By GPU: kernels' time a call with the busiest names, and the share of the time in which nothing runs."""
    from jax.profiler import ProfileData

    path = next(Path(trace).rglob("*.xplane.pb"))
    found: dict[str, Any] = {}
    for plane in ProfileData.from_file(str(path)).planes:
        events = [e for line in plane.lines if line.name.startswith("Stream") for e in line.events] if "GPU" in plane.name else []
        if not events:
            continue
        times: dict[str, list[float]] = collections.defaultdict(list)
        for event in events:
            times[event.name[:48]].append(event.duration_ns / 1000)
        spans = sorted((e.start_ns, e.start_ns + e.duration_ns) for e in events)
        busy, end = 0.0, 0.0
        for start, stop in spans:
            busy += max(stop - max(start, end), 0)
            end = max(end, stop)
        top = sorted(times.items(), key=lambda item: -sum(item[1]))[:4]
        found[plane.name.split("/")[-1].split()[0]] = {
            "span_ms": round((end - spans[0][0]) / calls / 1e6, 3),
            "busy_ms": round(busy / calls / 1e6, 3),
            "kernels": [
                [name, len(t) // calls, *(round(v, 1) for v in (min(t), sorted(t)[len(t) // 2], max(t)))] for name, t in top
            ],
        }
    return {"trace": found}


if __name__ == "__main__":
    main()
