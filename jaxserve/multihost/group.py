"""The two lives of a process of a group: leading it, or following. Ties the parts of this folder to start-up."""

from __future__ import annotations

import logging
import signal
from dataclasses import replace
from functools import partial

import jax

from jaxserve.async_engine import AsyncEngine
from jaxserve.compiling import Progress
from jaxserve.config import EngineConfig
from jaxserve.engine import Engine
from jaxserve.errors import ConfigError
from jaxserve.metrics import Observer
from jaxserve.multihost.config import GroupConfig
from jaxserve.multihost.identity import identity_of
from jaxserve.multihost.leader import Leader, gather
from jaxserve.multihost.leading_runner import LeadingRunner
from jaxserve.multihost.worker import join
from jaxserve.runner import Runner
from jaxserve.startup import build_engine

log = logging.getLogger(__name__)


def lead(config: EngineConfig, group: GroupConfig) -> Leader:
    """Process 0: waits for the others, and makes their devices and its own one. Must run before jax is asked for devices.

    Raises:
        ConfigError: an option does not go with several processes, or they have not come.
        ModelLoadError: there is no such model.
    """
    _check(config)
    leader = gather(group, identity_of(config, group.num_processes))
    leader.start_together()
    _initialize(group)
    return leader


def follow(config: EngineConfig, group: GroupConfig) -> None:
    """Any other process: serves process 0 until that ends.

    Raises:
        ConfigError: process 0 is not there, or refuses this process.
        ModelLoadError: there is no such model.
    """
    _check(config)
    worker = join(group, identity_of(config, group.num_processes))
    worker.wait_for_start()
    try:
        _initialize(group)
        engine = build_engine(replace(config, model=replace(config.model, skip_tokenizer_init=True)))
        assert isinstance(engine, Engine) and isinstance(engine.runner, Runner)
        worker.wait_for_service(what_is_built(engine.description))
        log.info("process %d of %d is ready", group.process_id, group.num_processes)
        # Whoever stops a group often tells all of its processes at once; process 0 then still has requests to finish.
        signal.signal(signal.SIGTERM, lambda *_: log.info("waiting for process 0 to end"))
        worker.follow(engine.runner)
    except Exception as error:  # whatever it is: the others' devices wait for this one's
        log.exception("this process cannot go on")
        worker.fail(f"{type(error).__name__}: {error}")


def build_leading(
    leader: Leader, config: EngineConfig, *, observer: Observer | None, on_progress: Progress | None
) -> AsyncEngine:
    """Process 0's engine, once every process is ready to compute with it."""
    make_runner = partial(LeadingRunner, leader)
    engine = AsyncEngine.from_config(config, observer=observer, on_progress=on_progress, make_runner=make_runner)
    leader.wait_until_ready(what_is_built(engine.describe()))
    leader.on_failure(engine.give_up)
    return engine


def what_is_built(description: dict[str, str]) -> dict[str, str]:
    """What must be alike in every process, of what start-up prints."""
    return {name: text for name, text in description.items() if name != "model"}  # its path may differ


def _check(config: EngineConfig) -> None:
    if config.parallel.data_parallel_size > 1:
        raise ConfigError(
            "data_parallel_size is for one host: start a server for each copy of the model, with a load balancer before them"
        )


def _initialize(group: GroupConfig) -> None:
    host, port = group.address
    address = f"[{host}]:{port + 1}" if ":" in host else f"{host}:{port + 1}"
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for itself
    try:
        jax.distributed.initialize(
            address,
            group.num_processes,
            group.process_id,
            coordinator_bind_address=address,
            cluster_detection_method="deactivate",
        )
    except RuntimeError as e:
        raise ConfigError(f"jax.distributed cannot meet at {address}: {e}. Is the port after --coordinator's free?") from e
