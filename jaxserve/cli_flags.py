"""Config dataclasses as command-line flags and as a YAML file. Knows fields, not what they do."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import Field
from pathlib import Path
from typing import Any

from jaxserve.config import choices_of, unknown_option
from jaxserve.errors import ConfigError

Fields = Mapping[str, Field[Any]]
"""Option name -> its dataclass field."""

_KINDS: dict[str, tuple[type, str]] = {
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "bool": (bool, "true or false"),
    "str": (str, "text"),
}


def add_flags(parser: argparse.ArgumentParser, title: str, description: str, options: Iterable[Field[Any]]) -> None:
    """Adds a group with a flag for each field. A flag that is not given leaves no attribute behind."""
    group = parser.add_argument_group(title, description)
    for f in options:
        default = "" if f.default is None else f" (default: {_shown(f.default)})"
        settings: dict[str, Any] = {
            "dest": f.name,
            "default": argparse.SUPPRESS,
            "help": (f.metadata["help"] + default).replace("%", "%%"),
        }
        kind = _kind(f)[0]
        if choices := choices_of(f):
            settings["choices"] = choices
        elif kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings |= {"type": kind, "metavar": kind.__name__.upper()}
        group.add_argument(f"--{f.name.replace('_', '-')}", **settings)


def read_options(args: argparse.Namespace, known: Fields) -> dict[str, Any]:
    """The options that the command line gives, over those of its --config file.

    Raises:
        ConfigError: the file cannot be read, or holds an unknown option or a value of the wrong type.
    """
    from_file = _read_file(Path(args.config), known) if args.config else {}
    return from_file | {name: getattr(args, name) for name in known if hasattr(args, name)}


def batch_files(args: argparse.Namespace) -> tuple[Path, Path]:
    """The input and the output, as words or as flags; a word before them is left as the model.

    Raises:
        ConfigError: there are more words, or fewer.
    """
    words = [*([args.model] if hasattr(args, "model") else []), *args.files]
    files = [name for name in (args.input, args.output) if name is not None] or words[-2:]
    model = words if args.input or args.output else words[:-2]
    if len(files) != 2 or len(model) > 1:
        raise ConfigError("give the requests and where the responses go: jaxserve run-batch [MODEL] INPUT OUTPUT")
    if model:
        args.model = model[0]
    elif words:
        del args.model
    return Path(files[0]), Path(files[1])


def _read_file(path: Path, known: Fields) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read --config {path}: {getattr(e, 'strerror', None) or e}") from e
    except yaml.YAMLError as e:
        raise ConfigError(f"--config {path} is not valid YAML: {' '.join(str(e).split())}") from e
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must hold lines such as `max_model_len: 4096`")
    options = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ConfigError(f"--config {path}: {unknown_option(name, known)}")
        if value is not None:
            options[name] = _checked(known[name], value, path)
    return options


def _checked(f: Field[Any], value: object, path: Path) -> object:
    kind, wanted = _kind(f)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"--config {path}: {f.name} must be {wanted}; got {value!r}")
    return value


def _kind(f: Field[Any]) -> tuple[type, str]:
    text = str(f.type).removesuffix(" | None")  # a string, as annotations are postponed
    return _KINDS["str" if text.startswith("Literal[") else text]


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return str(default)
