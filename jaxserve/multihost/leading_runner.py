"""LeadingRunner: process 0's Runner, which has every other process do what it does on the devices, in the same order."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from jaxserve.errors import EngineDeadError
from jaxserve.multihost.leader import Leader
from jaxserve.multihost.wire import Message
from jaxserve.plan import PlanShape
from jaxserve.programs import ProgramInputs, Programs
from jaxserve.runner import Runner
from jaxserve.sampler import Mode
from jaxserve.shaping import Shaping
from jaxserve.weight_store import WeightStore

CAUSE_S = 2.0  # a collective fails at once when a process dies; the connection says a little later which one


class LeadingRunner(Runner):
    """A Runner whose work on the devices is sent to the group first."""

    def __init__(self, leader: Leader, weights: WeightStore, programs: Programs, inputs: ProgramInputs) -> None:
        super().__init__(weights, programs, inputs)
        self._leader = leader
        self._shape_numbers = {shape: number for number, shape in enumerate(inputs.buckets.shapes)}

    def run(self, shape: PlanShape, packed: NDArray[np.int32], mode: Mode | None, num_sampled: int) -> list[dict[str, jax.Array]]:
        fields = {"shape": self._shape_numbers[shape], "mode": None if mode is None else mode.value, "sampled": num_sampled}
        self._leader.broadcast(Message("run", fields, (packed,)))
        return super().run(shape, packed, mode, num_sampled)

    def copy(self, program: str, sources: NDArray[np.int32], targets: NDArray[np.int32]) -> None:
        self._leader.broadcast(Message("copy", {"program": program}, (sources, targets)))
        super().copy(program, sources, targets)

    def write_shaping(self, row: Shaping, slot: int) -> None:
        arrays: tuple[NDArray[Any], ...] = tuple(jax.tree.leaves(row))
        self._leader.broadcast(Message("shaping", {"slot": slot}, arrays))
        super().write_shaping(row, slot)

    def reset(self) -> None:
        """What is under way on the others' devices cannot be called back, so a group does not go on after a failed step."""
        cause = self._leader.wait_for_cause(CAUSE_S) or "a step failed, which a group of processes cannot repeat"
        self._leader.fail(cause)
        raise EngineDeadError(f"{cause}; start the group again")

    def shutdown(self) -> None:
        self._leader.end()
        super().shutdown()
