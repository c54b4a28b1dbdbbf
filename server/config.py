"""ServerConfig: the HTTP server's own options. What the engine does is EngineConfig's."""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.config import option
from jaxserve.errors import ConfigError

MIB = 1024**2


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where the server listens, and what it allows a client."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 takes requests from other machines, without any password")
    port: int = option(8000, "port to listen on; 0 picks a free one")
    max_body_bytes: int = option(32 * MIB, "a larger request body is refused")
    shutdown_timeout: int = option(10, "seconds that running requests get to finish on SIGTERM or Ctrl-C")
    max_stored_responses: int = option(1000, "responses of /v1/responses that are kept for clients to come back to; 0 keeps none")
    access_log: bool = option(False, "log a line for each HTTP request")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be between 0 and 65535; got {self.port}")
        if self.max_body_bytes < 1:
            raise ConfigError(f"max_body_bytes must be at least 1; got {self.max_body_bytes}")
        if self.max_stored_responses < 0:
            raise ConfigError(f"max_stored_responses must be 0 or more; got {self.max_stored_responses}")
        if self.shutdown_timeout < 0:
            raise ConfigError(f"shutdown_timeout must be 0 or more; got {self.shutdown_timeout}")
