"""The command line: flags are the config's fields, files and errors, and each command over a fake engine."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import types
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import httpx
import pytest

import jaxserve
from jaxserve import cli
from jaxserve.config import EngineConfig, choices_of, option_fields
from jaxserve.errors import ConfigError, EngineDeadError
from jaxserve.outputs import CompletionOutput, RequestOutput
from jaxserve.sampling_params import SamplingParams
from tests.server.fake_engine import FakeEngine

ROOT = Path(__file__).parents[1]
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
OPTIONS = cli.ENGINE_OPTIONS | cli.SERVER_OPTIONS
FLAGS = [name for name in OPTIONS if name != "model"]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(FRACTION, raising=False)
    yield
    os.environ.pop(FRACTION, None)  # the command line sets it


def read(*argv: str) -> dict[str, Any]:
    """The options of a `serve` command line."""
    return cli.read_options(cli.make_parser().parse_args(["serve", *argv]), OPTIONS)


def other_value(name: str) -> Any:
    """A valid value that is not the option's default."""
    f = OPTIONS[name]
    if choices := choices_of(f):
        return choices[-1]
    if isinstance(f.default, bool):
        return not f.default
    return {"int": 3, "float": 0.5, "str": "text"}[str(f.type).removesuffix(" | None")]


# Flags


def test_options_have_names_of_their_own() -> None:
    assert len(OPTIONS) == len(list(option_fields())) + len(fields(cli.ServerConfig))


@pytest.mark.parametrize("name", FLAGS)
def test_each_field_has_a_flag(name: str) -> None:
    value, flag = other_value(name), "--" + name.replace("_", "-")
    argv = {True: [flag], False: [flag.replace("--", "--no-", 1)]}[value] if isinstance(value, bool) else [flag, str(value)]
    assert read("m", *argv) == {"model": "m", name: value}


def test_flags_make_the_config() -> None:
    options = {name: other_value(name) for name in cli.ENGINE_OPTIONS}
    config = EngineConfig.from_options(**options)
    for part, f in option_fields():
        assert getattr(getattr(config, part), f.name) == options[f.name]


def test_nothing_given_is_nothing_set() -> None:
    assert read() == {}


@pytest.mark.parametrize("command", ["serve", "chat", "generate", "compile"])
def test_help_shows_every_flag_with_its_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, f in (OPTIONS if command == "serve" else cli.ENGINE_OPTIONS).items():
        assert f.metadata["help"] in text
        if name != "model":
            assert "--" + name.replace("_", "-") in text
    assert "(default: 0.9)" in text and "(default: on)" in text and "(default: auto)" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"jaxserve {jaxserve.__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    program = """
        import sys
        from jaxserve import cli
        try:
            cli.main(["serve", "--help"])
        except SystemExit:
            print("heavy:", sorted({"jax", "numpy", "fastapi", "uvicorn", "pydantic", "transformers", "rich", "yaml"} & set(sys.modules)))
    """
    output = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True).stdout
    assert output.endswith("heavy: []\n")


@pytest.mark.parametrize(
    "argv", [[], ["fly"], ["serve", "m", "--max-model", "5"], ["serve", "m", "--dtype", "int4"], ["serve", "m", "--port", "high"]]
)
def test_usage_errors(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2


# --config


def config_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "options.yaml"
    path.write_text(text)
    return str(path)


def test_config_file_and_the_flags_over_it(tmp_path: Path) -> None:
    text = "model: m\nmax_model_len: 100\nmax-num-seqs: 4\nport: 9000\ngpu_memory_utilization: 1\naccess_log: true\nseed:\n"
    options = read("--config", config_file(tmp_path, text), "--max-model-len", "200", "--no-access-log")
    assert options == {
        "model": "m",
        "max_model_len": 200,
        "max_num_seqs": 4,
        "port": 9000,
        "gpu_memory_utilization": 1.0,
        "access_log": False,
    }
    assert read("other", "--config", config_file(tmp_path, "model: m"))["model"] == "other"
    assert read("--config", config_file(tmp_path, "# nothing\n")) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_model_length: 5", "unknown option 'max_model_length'. Did you mean 'max_model_len'?"),
        ("max_model_len: long", "max_model_len must be a whole number; got 'long'"),
        ("max_model_len: 1.5", "max_model_len must be a whole number; got 1.5"),
        ("max_model_len: true", "max_model_len must be a whole number; got True"),
        ("gpu_memory_utilization: '0.5'", "gpu_memory_utilization must be a number; got '0.5'"),
        ("enable_prefix_caching: 1", "enable_prefix_caching must be true or false; got 1"),
        ("host: 127", "host must be text; got 127"),
        ("- a list", "must hold lines such as `max_model_len: 4096`"),
        ("a: [", "is not valid YAML: while parsing"),
        ("a: !!python/object/apply:os.system [ls]", "is not valid YAML"),
    ],
)
def test_bad_config_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read("--config", config_file(tmp_path, text))
    assert message in str(caught.value) and "options.yaml" in str(caught.value)


def test_config_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read --config .*none.yaml: No such file"):
        read("--config", str(tmp_path / "none.yaml"))


# Errors


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serve"], "no model: give MODEL"),
        (["generate", "--prompt", "a"], "no model: give MODEL"),
        (["serve", "m", "--max-model-len", "0"], "max_model_len must be at least 1"),
        (["serve", "m", "--port", "70000"], "port must be between"),
        (["serve", "m", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1:8000"),
        (["chat", "m", "--gpu-memory-utilization", "2"], "gpu_memory_utilization must be above 0"),
    ],
)
def test_error_is_one_line(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert cli.main(argv) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith(f"error: {message}") and output.err.count("\n") == 1


# Commands


class FakeLLM:
    """Answers a prompt with its capitals."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config

    @classmethod
    def from_engine(cls, config: EngineConfig) -> Self:
        return cls(config)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get_default_sampling_params(self) -> SamplingParams:
        return SamplingParams(temperature=0.6, top_k=20)

    def generate(self, prompts: list[str], params: SamplingParams, use_tqdm: bool) -> list[RequestOutput]:
        self.__class__.last = (self.config, params)
        return [RequestOutput("r", p, [1], [CompletionOutput(0, p.upper(), [2])], True) for p in prompts]


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    """Its engine is the config."""

    def build_engine(config: EngineConfig, *, on_progress: Any) -> EngineConfig:
        on_progress("weights", 1, 2)
        return config

    monkeypatch.setitem(sys.modules, "jaxserve.startup", types.SimpleNamespace(build_engine=build_engine))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "jaxserve.llm", types.SimpleNamespace(LLM=FakeLLM))  # type: ignore[arg-type]
    return FakeLLM


def test_generate(llm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "generate",
        "m",
        "--prompt",
        "hello",
        "--max-tokens",
        "5",
        "--temperature",
        "0",
        "--stop",
        "a",
        "--stop",
        "b",
        "--seed",
        "3",
    ]
    assert cli.main(argv) == 0
    output = capsys.readouterr()
    assert output.out == "HELLO\n" and "weights" in output.err
    config, params = llm.last
    assert config == EngineConfig.from_options(model="m", seed=3)
    assert params == SamplingParams(temperature=0, top_k=20, max_tokens=5, stop=("a", "b"))


def test_generate_several(llm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "m", "--prompt", "one", "--prompt", "two"]) == 0
    assert capsys.readouterr().out == "> one\nONE\n\n> two\nTWO\n\n"


def test_generate_from_standard_input(llm: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a text\nof two lines\n"))
    assert cli.main(["generate", "m"]) == 0
    assert capsys.readouterr().out == "A TEXT\nOF TWO LINES\n"


def test_compile(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def compile_model(config: EngineConfig, *, on_progress: Any) -> list[types.SimpleNamespace]:
        assert config == EngineConfig.from_options(model="m", max_num_seqs=4)
        on_progress("compile", 1, 2)
        report = types.SimpleNamespace
        return [
            report(name="decode 4", seconds=0.25, temp_bytes=2**20, argument_bytes=3 * 2**29),
            report(name="forward 512", seconds=12.0, temp_bytes=2**30, argument_bytes=2**30),
        ]

    monkeypatch.setitem(sys.modules, "jaxserve.startup", types.SimpleNamespace(compile_model=compile_model))  # type: ignore[arg-type]
    assert cli.main(["compile", "m", "--max-num-seqs", "4"]) == 0
    output = capsys.readouterr()
    rows = [line.replace("│", " ").split() for line in output.out.splitlines()]
    assert rows[2:4] == [["forward", "512", "12.00", "1,024.0", "1,024.0"], ["decode", "4", "0.25", "1.0", "1,536.0"]]
    assert rows[4][:3] == ["2", "programs", "in"] and "compile" in output.err


@pytest.mark.parametrize(("reason", "status"), [(None, 0), ("too little memory", 1)])
def test_compile_for_a_target(
    reason: str | None, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = types.SimpleNamespace(name="tpu:v6e:2x2", devices=[1, 2], memory=2**30)
    program = types.SimpleNamespace(name="decode 4", seconds=1.5, temp_bytes=2**28, argument_bytes=2**28, output_bytes=0)
    sizes = {"resident_bytes": 2**29, "temporary_bytes": 2**28, "pool_bytes": 2**28}
    report = types.SimpleNamespace(programs=[program], kv_tokens=12_800, reason=reason, **sizes)
    compiling = types.SimpleNamespace(compile_for_target=lambda config, target, on_progress: report)
    monkeypatch.setattr("jaxserve.tpu.compile", compiling, raising=False)
    monkeypatch.setitem(sys.modules, "jaxserve.tpu.compile", compiling)  # type: ignore[arg-type]
    opening = types.SimpleNamespace(open_target={target.name: target}.__getitem__)
    monkeypatch.setitem(sys.modules, "jaxserve.tpu.target", opening)  # type: ignore[arg-type]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    assert cli.main(["compile", "m", "--target", "tpu:v6e:2x2", "--tensor-parallel-size", "2"]) == status
    out = capsys.readouterr().out
    if reason:
        assert out == "does not fit on 2 of the 2 devices of tpu:v6e:2x2: too little memory\n"
    else:
        assert "0.50 GiB for weights" in out
        assert "50.0%" in out and "fits: room for 12,800 tokens of keys and values" in out


def test_compile_needs_the_cache(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compile", "m", "--compilation-cache-dir", ""]) == 2
    assert "compile fills the compile cache, and compilation_cache_dir turns it off" in capsys.readouterr().err


def test_a_dead_engine_is_no_users_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run_serve(args: object) -> None:
        raise EngineDeadError("the engine has stopped")

    monkeypatch.setattr(cli, "run_serve", run_serve)
    assert cli.main(["serve", "m"]) == 1
    assert capsys.readouterr().err == "error: the engine has stopped\n"


@pytest.mark.parametrize(
    ("argv", "fraction"),
    [([], "0.95"), (["--gpu-memory-utilization", "0.5"], "0.55"), (["--gpu-memory-utilization", "1"], "0.98")],
)
def test_memory_fraction(llm: Any, argv: list[str], fraction: str) -> None:
    cli.main(["generate", "m", "--prompt", "a", *argv])
    assert os.environ[FRACTION] == fraction


def test_memory_fraction_of_the_user_stays(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FRACTION, "0.3")
    cli.main(["generate", "m", "--prompt", "a"])
    assert os.environ[FRACTION] == "0.3"


class Terminal:
    """A user who types the lines, then Ctrl-D."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: FakeEngine, *lines: str | type[BaseException]) -> None:
        self._lines = iter(lines)
        fake = types.SimpleNamespace(AsyncEngine=types.SimpleNamespace(from_config=self._load))
        monkeypatch.setitem(sys.modules, "jaxserve.async_engine", fake)  # type: ignore[arg-type]
        monkeypatch.setattr("builtins.input", self._input)
        self._engine = engine

    def _load(self, config: EngineConfig, *, observer: object, on_progress: Any) -> FakeEngine:
        on_progress("weights", 1, 2)
        on_progress("programs", 0, 5)
        on_progress("weights", 2, 2)
        return self._engine

    def _input(self, prompt: str) -> str:
        line = next(self._lines, EOFError)
        if isinstance(line, str):
            return line
        raise line


def asked(engine: FakeEngine, i: int) -> str:
    """The i-th prompt that reached the engine."""
    return bytes(engine.submitted[i][0]).decode()


def test_chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(lambda prompt, i: f"answer {len(engine.submitted)} ☕\x1b[2J")
    Terminal(monkeypatch, engine, "first", "", KeyboardInterrupt, "second", "/reset", "third")
    assert cli.main(["chat", "m", "--system", "be brief", "--temperature", "0"]) == 0
    output = capsys.readouterr().out
    assert "KV cache   64 pages of 16 tokens\n" in output
    assert "answer 1 ☕" in output and "answer 3 ☕" in output and "\x1b" not in output
    assert asked(engine, 0) == "system: be brief\nuser: first\nassistant: "
    assert asked(engine, 1) == "system: be brief\nuser: first\nassistant: answer 1 ☕\x1b[2J\nuser: second\nassistant: "
    assert asked(engine, 2) == "system: be brief\nuser: third\nassistant: "
    params = engine.submitted[0][1]
    assert (params.temperature, params.top_k, params.max_tokens) == (0.0, 20, None)
    assert engine.is_started and engine.is_shut_down


def test_chat_goes_on_after_a_bad_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(lambda prompt, i: "fine")
    Terminal(monkeypatch, engine, "x" * 1000, "no template", "short", "/exit", "never asked")
    assert cli.main(["chat", "m"]) == 0
    output = capsys.readouterr()
    assert "error: the prompt is too long" in output.err and "error: this model has no chat template" in output.err
    assert len(engine.submitted) == 1 and asked(engine, 0) == "user: short\nassistant: "


def test_ctrl_c_stops_the_answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(lambda prompt, i: "x" * 300)
    engine.token_delay_s = 0.01
    Terminal(monkeypatch, engine, "go", "again", "/exit")

    def interrupt() -> None:
        for i in (1, 2):
            while not (len(engine.submitted) == i and engine.running):
                stop.wait(0.01)
            stop.wait(0.1)
            os.kill(os.getpid(), signal.SIGINT)

    stop = threading.Event()
    thread = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with it ignored
    try:
        thread.start()
        assert cli.main(["chat", "m"]) == 0
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().out.count("(stopped)") == 2
    assert len(engine.aborted) == 2 and not engine.running
    assert asked(engine, 1).startswith("user: go\nassistant: x")


def test_chat_needs_a_tokenizer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine(tokenizer=False)
    Terminal(monkeypatch, engine)
    assert cli.main(["chat", "m", "--skip-tokenizer-init"]) == 2
    assert "error: chat needs a tokenizer" in capsys.readouterr().err and engine.is_shut_down


def test_serve() -> None:
    """In a process of its own, as signals are the main thread's."""
    program = """
        import sys, types
        from jaxserve import cli
        from tests.server.fake_engine import FakeEngine

        def from_config(config, *, observer, on_progress):
            assert "jax" not in sys.modules
            on_progress("programs", 1, 1)
            return FakeEngine(model=config.model.model)

        sys.modules["jaxserve.async_engine"] = types.SimpleNamespace(AsyncEngine=types.SimpleNamespace(from_config=from_config))
        sys.exit(cli.main(["serve", "org/m", "--port", "0"]))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    with process:
        assert process.stdout
        lines = []
        while not lines or not lines[-1].startswith("ready at "):
            line = process.stdout.readline()
            assert line, lines
            lines.append(line.rstrip())
        assert "model      org/m" in lines and "KV cache   64 pages of 16 tokens" in lines
        url = lines[-1].removeprefix("ready at ")
        reply = httpx.post(f"{url}/v1/completions", json={"model": "org/m", "prompt": "hi"}, timeout=20)
        assert reply.json()["choices"][0]["text"] == "hi"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_who_reads_the_list_of_models_may_go() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxserve", "models"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    with process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.wait(60) == 0 and process.stderr.read() == ""
