"""What several hosts cannot do is refused, and every process has its part of the mesh."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import pytest

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError, WeightsError
from jaxserve.multihost.config import GroupConfig
from jaxserve.multihost.group import follow, lead
from jaxserve.sharding import _of_every_process, make_meshes
from jaxserve.weight_store import WeightStore


@pytest.mark.parametrize("run", [lead, follow])
def test_replicas(run: Any) -> None:
    config = EngineConfig.from_options(model="m", data_parallel_size=2)
    with pytest.raises(ConfigError, match="data_parallel_size is for one host"):
        run(config, GroupConfig(num_processes=2, coordinator="127.0.0.1:9000"))


def test_new_weights() -> None:
    elsewhere: Any = SimpleNamespace(sharding=SimpleNamespace(is_fully_addressable=False))
    with pytest.raises(WeightsError, match="several hosts cannot be replaced; start the group again"):
        WeightStore(["w"], [elsewhere], ()).place({})


def test_devices_of_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    devices: Any = [SimpleNamespace(process_index=i // 4, id=i) for i in range(8)]
    assert [device.id for device in _of_every_process(devices, 4)] == [0, 1, 4, 5]
    assert [device.id for device in _of_every_process(devices, 8)] == list(range(8))
    with pytest.raises(ConfigError, match="tensor_parallel_size=3 does not spread evenly over the 2 processes"):
        make_meshes(3, 1)
