"""CostModel: how long a step takes on some device, and the engine that is served with it. Fitted to measured steps."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jaxserve.errors import ConfigError
from jaxserve.models.cache_layout import Reach
from jaxserve.plan import PlanShape
from jaxserve.step_plan import StepPlan


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """A step takes step_us + the rows or tokens of its program (padded ones too) + what attention reads and computes.

    Attributes:
        name: the model and the device.
        source: the measurements behind the figures.
        step_us: any step.
        row_us: each row of a program for steps in which every request has one token.
        token_us: each token of any other program.
        context_us: each token in the pool that a row's attention reads.
        pair_us: each pair of a prompt token and a token that it attends to.
        page_size, num_pages: of the pool.
        windows: for each page table of a request, how many tokens the layers look back at (null: all of them).
        platform: whose programs are compiled ("gpu", "tpu" or "cpu"): it decides to which sizes steps are padded.
        max_num_seqs, max_num_batched_tokens, max_model_len, enable_prefix_caching: options of the engine.
    """

    name: str
    source: str
    step_us: float
    row_us: float
    token_us: float
    context_us: float
    pair_us: float
    page_size: int
    num_pages: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    platform: str = "gpu"
    enable_prefix_caching: bool = True
    windows: tuple[int | None, ...] = (None,)

    @property
    def reaches(self) -> tuple[Reach, ...]:
        return tuple(map(Reach, self.windows))

    def step_s(self, plan: StepPlan, shape: PlanShape) -> float:
        """Seconds of a step that runs in a program of some shape."""
        time_us = self.step_us + (self.row_us * shape.num_rows if shape.is_decode else self.token_us * shape.num_tokens)
        context = sum(request.num_computed for request in plan.decodes)
        context += sum(row.start + row.num_tokens for row in plan.rows)
        pairs = sum(row.num_tokens * (row.start + (row.num_tokens + 1) / 2) for row in plan.rows if row.num_tokens > 1)
        return (time_us + self.context_us * context + self.pair_us * pairs) * 1e-6


def read_cost(path: Path) -> CostModel:
    """The model in a JSON file, an object with the fields of CostModel.

    Raises:
        ConfigError: the file cannot be read, or a field is missing, unknown or no such value.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the cost model {path}: {error}") from error
    kinds: dict[str, Any] = {f.name: f for f in fields(CostModel)}
    optional = {"platform", "enable_prefix_caching", "windows"}
    if not isinstance(found, dict) or not kinds.keys() - optional <= found.keys() <= kinds.keys():
        raise ConfigError(f"{path}: wanted a JSON object with the fields {', '.join(kinds)}")
    for name, value in found.items():
        _check(name, str(kinds[name].type), value, path)
    return CostModel(**found | {"windows": tuple(found.get("windows", (None,)))})


def _check(name: str, kind: str, value: Any, path: Path) -> None:
    if kind == "int" and not _is_count(value):
        raise ConfigError(f"{path}: {name} must be a whole number of at least 1; got {value!r}")
    if kind == "float" and (type(value) not in (int, float) or value < 0):
        raise ConfigError(f"{path}: {name} must be microseconds, 0 or more; got {value!r}")
    if kind == "bool" and type(value) is not bool:
        raise ConfigError(f"{path}: {name} must be true or false; got {value!r}")
    if name == "windows" and not (isinstance(value, list) and value and all(w is None or _is_count(w) for w in value)):
        raise ConfigError(f"{path}: windows must be a list of whole numbers of at least 1, or null; got {value!r}")
    if name == "platform" and value not in ("cpu", "gpu", "tpu"):
        raise ConfigError(f"{path}: platform must be cpu, gpu or tpu; got {value!r}")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1
