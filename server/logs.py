"""How the server's log looks: a line or a JSON object a record, in which no client can begin another."""

from __future__ import annotations

import json
import logging
import re
from datetime import UTC, datetime

from jaxserve.server.config import ServerConfig

ACCESS = "jaxserve.access"
FIELDS = "fields"  # the attribute of a record that has what it says, by name

_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def set_up_logging(config: ServerConfig) -> None:
    """Makes the whole process log to standard error; to be called once."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if config.log_format == "json" else TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger(ACCESS).setLevel(logging.INFO if config.access_log else logging.WARNING)


def one_line(text: str) -> str:
    """The text with its control characters spelled out."""
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


class TextFormatter(logging.Formatter):
    """Time, level, logger and message in one line; a traceback below it."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_time(record)} {record.levelname} {record.name}: {one_line(record.getMessage())}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """The same as an object of one line, with the record's fields."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {"time": _time(record), "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        entry |= getattr(record, FIELDS, {})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
