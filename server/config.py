"""ServerConfig: the HTTP server's own options. What the engine does is EngineConfig's."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from jaxserve.config import check_choice, option
from jaxserve.errors import ConfigError

MIB = 1024**2
KEY_VARIABLE = "JAXSERVE_API_KEY"
_MAY_BE_ZERO = {"port", "shutdown_timeout", "max_stored_responses", "rate_limit"}
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where the server listens, and what it allows a client."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 takes requests from other machines: set keys first")
    port: int = option(8000, "port to listen on; 0 picks a free one")
    # Who may ask
    api_key: str | None = option(
        None,
        f"the key that clients must send; others on this machine can see it here, so prefer {KEY_VARIABLE} or a file of keys",
    )
    api_key_file: str | None = option(None, "file of hashed keys, one a line, as `jaxserve new-key` prints them")
    isolate_prefix_cache: bool = option(True, "prompts of different keys share no cached pages, so that none can probe another's")
    allowed_hosts: str | None = option(
        None, "names under which the server may be asked, with commas, * for any; without keys only this machine's and --host"
    )
    cors_origins: str | None = option(
        None, "origins whose web pages may use the server, with commas, * for any; none if not given"
    )
    ssl_certfile: str | None = option(None, "certificate chain (PEM): the server then speaks HTTPS")
    ssl_keyfile: str | None = option(None, "its private key (PEM), if the certificate's file does not hold it")
    ssl_ca_certs: str | None = option(None, "only clients with a certificate that these (PEM) have signed may connect")
    # How much
    rate_limit: int = option(0, "requests a minute of one key, or one address where there are no keys; 0 is any number")
    max_connections: int = option(4096, "connections at once; more are refused with 503")
    max_header_bytes: int = option(65536, "a longer request head is refused with 431")
    max_body_bytes: int = option(32 * MIB, "a larger request body is refused with 413")
    max_json_depth: int = option(64, "a request body whose brackets are nested deeper is refused")
    max_stored_responses: int = option(1000, "responses of /v1/responses that are kept for clients to come back to; 0 keeps none")
    # How long
    header_timeout: int = option(10, "seconds that a request's head may take")
    body_timeout: int = option(60, "seconds that a request's body may take")
    prompt_timeout: int = option(20, "seconds that the chat template and the tokenizer may take for a request")
    write_timeout: int = option(60, "seconds that a client may leave an answer unread before its connection is cut")
    keep_alive_timeout: int = option(5, "seconds that a connection may be idle between two requests")
    shutdown_timeout: int = option(10, "seconds that running requests get to finish on SIGTERM or Ctrl-C")
    watchdog_timeout: int = option(300, "seconds that a step of the engine may take before the server gives up and ends")
    # What is seen
    log_format: Literal["text", "json"] = option("text", "json: a JSON object a line")
    metrics_alias: str | None = option(
        None, "every metric also under this prefix instead of jaxserve, such as vllm for its dashboards"
    )
    otlp_traces_endpoint: str | None = option(
        None, "URL to which a trace of each request is sent (OTLP over HTTP); needs `pip install jaxserve[otel]`"
    )
    profile: str | None = option(None, "folder for traces of the device, which POST /start_profile and /stop_profile take")
    access_log: bool = option(False, "log a line for each HTTP request")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be between 0 and 65535; got {self.port}")
        for f in fields(self):
            check_choice(f, value := getattr(self, f.name))
            least = 0 if f.name in _MAY_BE_ZERO else 1
            if type(value) is int and value < least:
                raise ConfigError(f"{f.name} must be at least {least}; got {value}")
        for name in ("api_key_file", "ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
            path = getattr(self, name)
            if path is not None and not Path(path).expanduser().is_file():
                raise ConfigError(f"{name}: there is no file {path}")
        if self.metrics_alias is not None and re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", self.metrics_alias) is None:
            raise ConfigError(f"metrics_alias must be letters, digits and underscores; got {self.metrics_alias!r}")
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_ca_certs):
            raise ConfigError("ssl_keyfile and ssl_ca_certs need ssl_certfile")

    @property
    def single_key(self) -> str | None:
        """The key that was given as such, on the command line or in the environment."""
        return self.api_key if self.api_key is not None else os.environ.get(KEY_VARIABLE)

    def hosts(self, has_keys: bool) -> tuple[str, ...] | None:
        """The names that a request's Host may be; None for any.

        Without keys, a web page elsewhere could reach a local server under a name of its own (DNS rebinding).
        """
        if self.allowed_hosts is not None:
            names = _split(self.allowed_hosts)
            return None if "*" in names else names
        if has_keys or self.host not in _LOCAL_HOSTS:
            return None
        return _LOCAL_HOSTS

    @property
    def origins(self) -> tuple[str, ...]:
        return _split(self.cors_origins or "")


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip().lower() for part in text.split(",") if part.strip())
