"""`jaxserve serve`, once its options are known: a server on this machine, or a process of a group that serves on several."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from jaxserve.config import EngineConfig
from jaxserve.errors import JaxserveError
from jaxserve.multihost.config import GroupConfig
from jaxserve.server.config import ServerConfig

if TYPE_CHECKING:
    from jaxserve.async_engine import AsyncEngine
    from jaxserve.metrics import Observer

    BuildEngine = Callable[..., AsyncEngine]
    Load = Callable[[EngineConfig, Observer, BuildEngine | None], AsyncEngine]


def serve(config: EngineConfig, server_config: ServerConfig, load: Load, build: BuildEngine | None = None) -> None:
    """Serves until it is told to stop.

    Args:
        load: shows how far loading is.
        build: what makes the engine, if not AsyncEngine.from_config.
    """
    from jaxserve.server.app import create_app
    from jaxserve.server.logs import set_up_logging
    from jaxserve.server.metrics import EngineMetrics
    from jaxserve.server.run import bind, run

    set_up_logging(server_config)
    with bind(server_config) as sock:  # before the model is loaded: a busy port is known at once
        metrics = EngineMetrics(config.model.served_model_name or config.model.model)
        tracing = None
        if server_config.otlp_traces_endpoint is not None:
            from jaxserve.server.tracing import trace_to

            tracing = trace_to(server_config.otlp_traces_endpoint, metrics, config.model.model)
        engine = load(config, tracing or metrics, build)
        app = create_app(engine, server_config, metrics=metrics, tracing=tracing)
        run(app, engine, sock, server_config, lambda url: print(f"ready at {url}", flush=True))


def serve_in_group(
    config: EngineConfig,
    server_config: ServerConfig,
    group: GroupConfig,
    load: Load,
    report: Callable[[JaxserveError], int],
) -> NoReturn:
    """The same on several hosts; ends the process.

    Args:
        report: prints an error and gives the exit status.
    """
    from jaxserve.multihost.exits import leave
    from jaxserve.multihost.group import build_leading, follow, lead
    from jaxserve.server.logs import set_up_logging

    set_up_logging(server_config)
    status = 1
    try:
        if group.process_id > 0:
            follow(config, group)
        else:
            with lead(config, group) as leader:
                serve(config, server_config, load, partial(build_leading, leader))
        status = 0
    except JaxserveError as error:
        status = report(error)
    except KeyboardInterrupt:
        status = 130
    except Exception:  # noqa: BLE001  whatever it is, the process must not end by way of jax's shutdown
        traceback.print_exc()
    finally:
        leave(status)
