"""The engine's options: small frozen dataclasses, joined by composition. CLI flags and the docs table come from the fields.

Names are vLLM's where it has them. None means "chosen for the platform and the model"; `resolve` fills it in.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

from jaxserve.errors import ConfigError

GIB = 1024**3
MAX_STEPS = 8  # of one program: a new request waits for two such programs


def option(default: Any, help: str) -> Any:
    """A config field with its help text, from which the CLI flag is made."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and how it is read."""

    model: str = option("", "a folder, a .gguf file, hf:org/name, or a catalogue name such as smollm2")
    tokenizer: str | None = option(None, "folder or hf:org/name of the tokenizer, if not the model's own")
    served_model_name: str | None = option(None, "the name that clients use; the MODEL argument if not given")
    load_format: Literal["auto", "dummy"] = option("auto", "dummy: random weights, from config.json alone")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "auto: float32 on CPU; elsewhere the checkpoint's, float16, float32 and GGUF as bfloat16"
    )
    quantization: Literal["fp8"] | None = option(
        None,
        "fp8: the layers' matmuls in 8 bits, rounded while the weights load, with a scale a channel and a token; a checkpoint of 8 bits needs no option",
    )
    max_model_len: int | None = option(None, "longest prompt plus output in tokens; the model's own limit if not given")
    skip_tokenizer_init: bool = option(False, "load no tokenizer: prompts and outputs are token ids")
    generation_config: Literal["auto", "none"] = option("auto", "none: ignore the model's own sampling defaults")
    seed: int = option(0, "seeds dummy weights, and the requests that bring no seed")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The paged KV pool."""

    block_size: int | None = option(None, "tokens in a KV page (16 on CPU and GPU, 64 on TPU)")
    gpu_memory_utilization: float = option(0.9, "share of the accelerator's memory that jaxserve may fill")
    kv_cache_memory_bytes: int | None = option(None, "bytes of the KV pool on each device (CPU: 1 GiB if not given)")
    num_gpu_blocks_override: int | None = option(None, "pages of the KV pool, instead of a size in bytes")
    kv_cache_dtype: Literal["auto", "fp8"] = option(
        "auto", "fp8: keys and values as e4m3, without scales; auto: as the model's dtype"
    )
    enable_prefix_caching: bool = option(True, "reuse the pages of prompts that begin alike")
    share_page_reads: bool = option(
        True, "H100 and H200: decode reads pages that requests have in common once for up to 64 query heads"
    )


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """How much runs at once."""

    max_num_seqs: int | None = option(None, "requests that run at once (16 on CPU, 256 elsewhere)")
    max_num_batched_tokens: int | None = option(None, "tokens of one step at most (512 on CPU, 8192 elsewhere)")
    num_scheduler_steps: int | None = option(
        None,
        "one GPU: decode steps that run for each time that the host plans, 1 to 8, while no request waits; tokens come as many at a "
        "time (up to 64 requests; 4 for models whose step takes the host longer than an H100 or H200, those below 4 GB; 1 for others)",
    )
    scheduling_policy: Literal["fcfs", "priority"] = option(
        "fcfs", "fcfs: in order of arrival; priority: the smaller a request's `priority`, the sooner it runs"
    )
    max_num_queued_reqs: int | None = option(
        None, "a server refuses requests (429) while it has so many, running or waiting, each of n samples counting n"
    )
    max_num_queued_tokens: int | None = option(
        None, "a server refuses requests (429) while so many prompt tokens wait for their request's first output"
    )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is spread over devices."""

    tensor_parallel_size: int = option(1, "devices that share each layer")
    data_parallel_size: int = option(1, "copies of the model, each on devices of its own, that share the requests")


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """The compiled programs."""

    compilation_cache_dir: str | None = option(
        None, "where compiled programs are kept (~/.cache/jaxserve/xla); the empty string turns the cache off"
    )

    peer_sums: bool = option(
        True,
        "GPUs with --tensor-parallel-size, in one process, that reach each other's memory (NVLink): they add up by writing into it; "
        "off, XLA's all-reduces do, which cut a step's CUDA graph twice a layer",
    )

    @property
    def cache_path(self) -> Path | None:
        if self.compilation_cache_dir == "":
            return None
        if self.compilation_cache_dir is not None:
            return Path(self.compilation_cache_dir).expanduser()
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(base).expanduser() / "jaxserve" / "xla"


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything the engine needs to know, in parts."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)

    def __post_init__(self) -> None:
        _check_positive(self.model, "max_model_len")
        _check_positive(self.cache, "block_size", "kv_cache_memory_bytes", "num_gpu_blocks_override")
        _check_positive(self.scheduler, "max_num_seqs", "max_num_batched_tokens", "max_num_queued_reqs", "max_num_queued_tokens")
        if self.scheduler.num_scheduler_steps not in (None, *range(1, MAX_STEPS + 1)):
            raise ConfigError(f"num_scheduler_steps must be 1 to {MAX_STEPS}; got {self.scheduler.num_scheduler_steps}")
        _check_positive(self.parallel, "tensor_parallel_size", "data_parallel_size")
        if not 0 < self.cache.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization must be above 0 and at most 1; got {self.cache.gpu_memory_utilization}")
        for part, f in option_fields():
            check_choice(f, getattr(getattr(self, part), f.name))

    @classmethod
    def from_options(cls, **options: Any) -> Self:
        """Builds the config from flat options, as `LLM(...)` and the CLI take them.

        Raises:
            ConfigError: for an option that does not exist, naming the closest one that does.
        """
        parts: dict[str, dict[str, Any]] = {f.name: {} for f in fields(cls)}
        owner = {f.name: part for part, f in option_fields()}
        for name, value in options.items():
            if name not in owner:
                raise ConfigError(unknown_option(name, owner))
            parts[owner[name]][name] = value
        types = {"model": ModelConfig, "cache": CacheConfig, "scheduler": SchedulerConfig}
        types |= {"parallel": ParallelConfig, "compile": CompileConfig}
        return cls(**{part: types[part](**values) for part, values in parts.items()})

    def resolve(self, platform: str, model_max_len: int) -> Self:
        """Fills in what was left to the platform and the model, and checks what depends on them.

        Args:
            platform: "cpu", "gpu" or "tpu".
            model_max_len: the longest context that the model's config declares, in tokens.
        """
        on_cpu = platform == "cpu"
        max_model_len = self.model.max_model_len or model_max_len
        if max_model_len > model_max_len:
            raise ConfigError(
                f"max_model_len is {max_model_len:,}, but the model's config says {model_max_len:,}. Lower --max-model-len."
            )
        scheduler = replace(
            self.scheduler,
            max_num_seqs=self.scheduler.max_num_seqs or (16 if on_cpu else 256),
            max_num_batched_tokens=self.scheduler.max_num_batched_tokens or (512 if on_cpu else 8192),
        )
        assert scheduler.max_num_seqs is not None and scheduler.max_num_batched_tokens is not None
        if scheduler.max_num_batched_tokens <= scheduler.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({scheduler.max_num_batched_tokens}) must be above max_num_seqs "
                f"({scheduler.max_num_seqs}), so that a step has room for prompts beside every request's next token"
            )
        block_size = self.cache.block_size or (64 if platform == "tpu" else 16)
        if platform == "tpu" and block_size % 32:
            raise ConfigError(f"block_size must be a multiple of 32 on a TPU, whose memory is tiled; got {block_size}")
        return replace(
            self,
            model=replace(self.model, max_model_len=max_model_len),
            cache=replace(self.cache, block_size=block_size),
            scheduler=scheduler,
        )


def xla_memory_fraction() -> float:
    """The share of a device's memory that XLA may take; fixed before jax starts, by the CLI or the user."""
    return float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75"))


def option_fields() -> Iterator[tuple[str, Field[Any]]]:
    """(part of EngineConfig, field) for every option, in the order of the help text."""
    types: dict[str, Any] = {"model": ModelConfig, "cache": CacheConfig, "scheduler": SchedulerConfig}
    types |= {"parallel": ParallelConfig, "compile": CompileConfig}
    for part, config in types.items():
        for f in fields(config):
            yield part, f


def unknown_option(name: str, known: Mapping[str, object]) -> str:
    """The text for an option that does not exist, with the closest one that does."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else f" Known options: {', '.join(sorted(known))}."
    return f"unknown option {name!r}.{hint}"


def check_choice(f: Field[Any], value: object) -> None:
    """Holds a Literal-typed field to its choices."""
    choices = choices_of(f)
    if choices and value not in choices and not (value is None and f.default is None):
        raise ConfigError(f"{f.name} must be one of {', '.join(choices)}; got {value!r}")


def choices_of(f: Field[Any]) -> tuple[str, ...]:
    """The choices of a Literal-typed field, empty for any other."""
    text = str(f.type).removesuffix(" | None")  # a string, as annotations are postponed
    return tuple(part.strip(" \"'") for part in text[8:-1].split(",")) if text.startswith("Literal[") else ()


def _check_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1; got {value!r}")
