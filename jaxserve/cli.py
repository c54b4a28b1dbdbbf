"""The command line, `jaxserve COMMAND`. Imports what a command needs only when it runs."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve import __version__
from jaxserve.cli_bench import add_bench
from jaxserve.cli_compile import compile_for_target, print_reports, show_progress
from jaxserve.cli_engine import ENGINE_OPTIONS, add_engine_flags, engine_config
from jaxserve.cli_flags import Fields, add_flags, batch_files, read_options
from jaxserve.cli_serve import serve, serve_in_group
from jaxserve.cli_simulate import add_simulate
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError, EngineDeadError, JaxserveError
from jaxserve.multihost.config import GroupConfig
from jaxserve.server.config import MIB, ServerConfig

if TYPE_CHECKING:
    from jaxserve.async_engine import AsyncEngine
    from jaxserve.cli_serve import BuildEngine
    from jaxserve.metrics import Observer

SERVER_OPTIONS: Fields = {f.name: f for f in fields(ServerConfig)}
GROUP_OPTIONS: Fields = {f.name: f for f in fields(GroupConfig)}

# What a FastChat worker has of the server's options
_WORKER_OPTIONS = ("host", "port", "max_body_bytes", "shutdown_timeout", "watchdog_timeout", "log_format")

# flag -> (type, help): how chat and generate sample; what is not given is the model's own
_SAMPLING: dict[str, tuple[type, str]] = {
    "max_tokens": (int, "output tokens at most"),
    "temperature": (float, "0 is greedy"),
    "top_p": (float, "keep the likeliest tokens with this probability together"),
    "top_k": (int, "keep this many likeliest tokens; 0 keeps all"),
    "min_p": (float, "drop tokens below this fraction of the likeliest one's probability"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 2 after an error that the user can mend, 1 when the engine has died.

    `compile --target` also gives 1, where the model does not fit.
    """
    args = make_parser().parse_args(argv)
    try:
        status: int = args.run(args) or 0
    except JaxserveError as e:
        return _report(e)
    except KeyboardInterrupt:
        return 130
    return status


def _report(error: JaxserveError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 1 if isinstance(error, EngineDeadError) else 2


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxserve", description="Serves large language models from JAX.")
    parser.add_argument("--version", action="version", version=f"jaxserve {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    server = _add_command(commands, "serve", run_serve, "an OpenAI-compatible server, with a chat page at /")
    add_flags(server, "server", inspect.getdoc(ServerConfig) or "", SERVER_OPTIONS.values())
    add_flags(server, "group", inspect.getdoc(GroupConfig) or "", GROUP_OPTIONS.values())
    add_engine_flags(server)

    chat = _add_command(commands, "chat", run_chat, "a conversation in the terminal")
    chat.add_argument("--system", metavar="TEXT", help="system prompt")
    _add_sampling_flags(chat, "as many as fit")
    add_engine_flags(chat)

    generate = _add_command(commands, "generate", run_generate, "complete prompts, without a chat template")
    generate.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated; standard input if not given")
    _add_sampling_flags(generate, "16")
    add_engine_flags(generate)

    batch = _add_command(commands, "run-batch", run_batch, "answer a file of requests in OpenAI's batch format")
    batch.usage = "jaxserve run-batch [MODEL] INPUT OUTPUT [options]"
    batch.add_argument(
        "files",
        nargs="*",
        metavar="INPUT OUTPUT",
        help="the requests, and where the responses go; without MODEL, the first request names it",
    )
    batch.add_argument("--input", metavar="FILE", help="JSON lines, each a request with a custom_id")
    batch.add_argument("--output", metavar="FILE", help="the responses, as JSON lines; must not exist")
    add_engine_flags(batch)

    worker = _add_command(commands, "fastchat-worker", run_fastchat_worker, "a worker for a FastChat controller")
    worker.add_argument("--controller-address", default="http://localhost:21001", metavar="URL", help="where the controller is")
    worker.add_argument("--worker-address", metavar="URL", help="where the controller finds this worker; its own if not given")
    worker.add_argument("--model-names", default="", metavar="A,B", help="the names that FastChat's users see")
    add_flags(worker, "server", inspect.getdoc(ServerConfig) or "", [SERVER_OPTIONS[name] for name in _WORKER_OPTIONS])
    add_engine_flags(worker)

    new_key = commands.add_parser("new-key", help="make an API key", description="Makes an API key for --api-key-file.")
    new_key.add_argument("name", metavar="NAME", help="whose key it is")
    new_key.add_argument("--admin", action="store_true", help="it opens the operator's routes, too")
    new_key.set_defaults(run=run_new_key)

    compile_ = _add_command(commands, "compile", run_compile, "fill the compile cache, so that later starts compile nothing")
    compile_.add_argument(
        "--target",
        metavar="TARGET",
        help="compile for devices that are not there, such as tpu:v6e:2x2 or gpu:h100:2, only to see whether the model fits",
    )
    add_engine_flags(compile_)

    convert = _add_command(commands, "convert", run_convert, "write a model's parameters as devices hold them, for faster starts")
    convert.add_argument("--output", metavar="FOLDER", required=True, help="what to serve afterwards; must be new or empty")
    add_engine_flags(convert)

    known = "the architectures that can be served, and how each is checked"
    models = commands.add_parser("models", help=known, description=known[0].upper() + known[1:] + ".")
    models.add_argument("--markdown", action="store_true", help="as the table in README.md")
    models.set_defaults(run=run_models)

    add_simulate(commands)
    add_bench(commands)
    return parser


def _add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        usage=f"jaxserve {name} MODEL [options]",
        allow_abbrev=False,  # an option that is added later must not change what a command line means
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help=ENGINE_OPTIONS["model"].metadata["help"]
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file of options by name, e.g. `max_model_len: 4096`; flags win over it"
    )
    return parser


def _add_sampling_flags(parser: argparse.ArgumentParser, max_tokens: str) -> None:
    group = parser.add_argument_group("sampling", "What is not given is the model's own default.")
    for name, (kind, text) in _SAMPLING.items():
        text += f" (default: {max_tokens})" if name == "max_tokens" else ""
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=kind.__name__.upper(), help=text)
    group.add_argument("--stop", action="append", metavar="TEXT", help="ends the output before this text; may be repeated")


# Commands


def run_serve(args: argparse.Namespace) -> None:
    options = read_options(args, {**ENGINE_OPTIONS, **SERVER_OPTIONS, **GROUP_OPTIONS})
    server_config = ServerConfig(**{name: options.pop(name) for name in SERVER_OPTIONS if name in options})
    group = GroupConfig(**{name: options.pop(name) for name in GROUP_OPTIONS if name in options})
    config = engine_config(options)
    if group.num_processes > 1:
        serve_in_group(config, server_config, group, _load, _report)
    serve(config, server_config, _load)


def run_chat(args: argparse.Namespace) -> None:
    engine = _load(engine_config(read_options(args, ENGINE_OPTIONS)))
    from jaxserve.cli_chat import Chat

    engine.start()
    try:
        Chat(engine, _sampling(args), args.system).run()
    finally:
        engine.shutdown()


def run_generate(args: argparse.Namespace) -> None:
    config = engine_config(read_options(args, ENGINE_OPTIONS))
    prompts = args.prompt or [_read_prompt()]
    from jaxserve.devices import expect_devices

    expect_devices()
    from jaxserve import LLM
    from jaxserve.cli_chat import printable
    from jaxserve.startup import build_engine

    with show_progress() as on_progress:
        engine = build_engine(config, on_progress=on_progress)
    with LLM.from_engine(engine) as llm:
        params = llm.get_default_sampling_params().with_(**_sampling(args))
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        text = output.outputs[0].text
        shown = f"> {prompt}\n{text}\n" if len(prompts) > 1 else text
        print(printable(shown) if sys.stdout.isatty() else shown)


def run_batch(args: argparse.Namespace) -> None:
    from jaxserve.server.run_batch import model_of, run_batch

    source, target = batch_files(args)
    options = read_options(args, ENGINE_OPTIONS)
    if "model" not in options:
        options["model"] = model_of(source)
    engine = _load(engine_config(options))
    assert engine.config.scheduler.max_num_seqs is not None, "the engine resolves it"
    with show_progress() as on_progress:
        counts = run_batch(
            engine,
            source,
            target,
            concurrency=2 * engine.config.scheduler.max_num_seqs,
            on_progress=lambda done, total: on_progress("requests", done, total),
        )
    print(f"{counts.completed} requests completed, {counts.failed} failed")


def run_fastchat_worker(args: argparse.Namespace) -> None:
    options = read_options(args, {**ENGINE_OPTIONS, **SERVER_OPTIONS})
    given = {name: options.pop(name) for name in _WORKER_OPTIONS if name in options}
    server_config = ServerConfig(**({"port": 21002} | given))
    config = engine_config(options)
    from jaxserve.server.fastchat.controller import Registration
    from jaxserve.server.fastchat.worker import Worker, create_worker
    from jaxserve.server.logs import set_up_logging
    from jaxserve.server.run import bind, run, url_of

    set_up_logging(server_config)
    with bind(server_config) as sock:
        engine = _load(config)
        worker = Worker(engine, [name for name in args.model_names.split(",") if name])
        address = args.worker_address or url_of(sock, server_config)
        registration = Registration(args.controller_address, address, worker.status)

        def on_ready(url: str) -> None:
            print(f"ready at {url}", flush=True)
            registration.start()

        try:
            run(create_worker(engine, worker, server_config), engine, sock, server_config, on_ready)
        finally:
            registration.stop()


def run_new_key(args: argparse.Namespace) -> None:
    from jaxserve.server.keys import new_key

    text, key = new_key(args.name, args.admin)
    print(f"the key, which is shown only now: {text}", file=sys.stderr)
    print(key.line)


def run_compile(args: argparse.Namespace) -> int:
    config = engine_config(read_options(args, ENGINE_OPTIONS))
    if args.target is not None:
        return compile_for_target(config, args.target)
    if config.compile.cache_path is None:
        raise ConfigError(
            "compile fills the compile cache, and compilation_cache_dir turns it off; name a folder, or leave it out"
        )
    from jaxserve.startup import compile_model

    started_s = time.monotonic()
    with show_progress() as on_progress:
        reports = compile_model(config, on_progress=on_progress)
    print_reports(reports, time.monotonic() - started_s)
    return 0


def run_convert(args: argparse.Namespace) -> None:
    config = engine_config(read_options(args, ENGINE_OPTIONS))
    from jaxserve.convert import convert_model

    with show_progress() as on_progress:
        size = convert_model(config, Path(args.output), on_progress=on_progress)
    print(f"wrote {size / MIB:,.0f} MiB of parameters; serve them with: jaxserve serve {args.output}")


def run_models(args: argparse.Namespace) -> None:
    from jaxserve.models.checks import models_list, models_table

    try:
        print(models_table() if args.markdown else models_list(), flush=True)
    except BrokenPipeError:  # `| head` has seen enough; what is left is flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# Their parts


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(args, name) for name in (*_SAMPLING, "stop")}
    return {name: value for name, value in given.items() if value is not None}


def _read_prompt() -> str:
    if sys.stdin.isatty():
        raise ConfigError("no prompt: give --prompt TEXT, or pipe a text into standard input")
    return sys.stdin.read().removesuffix("\n")


def _load(config: EngineConfig, observer: Observer | None = None, build: BuildEngine | None = None) -> AsyncEngine:
    """Loads the engine, shows how far it is, and says what came out."""
    from jaxserve.async_engine import AsyncEngine

    started_s = time.monotonic()
    with show_progress() as on_progress:
        engine = (build or AsyncEngine.from_config)(config, observer=observer, on_progress=on_progress)
    description = engine.describe() | {"loaded in": f"{time.monotonic() - started_s:.1f} s"}
    width = max(map(len, description))
    for name, text in description.items():
        print(f"{name:<{width}}  {text}")
    return engine


if __name__ == "__main__":
    sys.exit(main())
