"""What the source may not do at all, found by reading it; and what a model's folder cannot make it do."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.goldens import cases
from tests.test_layout import ROOT, imports, sources

RUNS_CODE = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "torch", "runpy", "code"}
# file -> what it unpickles, which nobody else can write
MAY_UNPICKLE = {
    "jaxserve/tracing_child.py": "a pipe of the process that has started it",
    "jaxserve/tracing_processes.py": "a pipe of a process that it has started",
}
OPENS_ADDRESSES = {
    "requests",
    "httpx",
    "aiohttp",
    "urllib.request",
    "http.client",
    "ftplib",
    "smtplib",
    "websockets",
    "zmq",
    "xmlrpc",
}
# file -> what it connects to
MAY_CONNECT = {
    "server/fastchat/controller.py": "the controller that the command line names",
    "jaxserve/cli_bench/serve.py": "the server that the command line names",
}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """(name of the function, call) for every call in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_nothing_runs_what_it_reads() -> None:
    for path in sources():
        allowed = {"pickle"} if path.relative_to(ROOT).as_posix() in MAY_UNPICKLE else set()
        found = {name.split(".")[0] for name in imports(path)} & RUNS_CODE - allowed
        assert not found, f"{path} imports {found}"
        for name, call in calls(path):
            assert name not in ("eval", "exec", "compile", "__import__", "yaml.load", "os.system", "os.popen"), (
                f"{path}: {name}()"
            )
            for keyword in call.keywords:
                text = f"{keyword.arg}={ast.unparse(keyword.value)}"
                assert text not in ("shell=True", "allow_pickle=True"), f"{path}: {name}({text})"


def test_no_code_comes_from_a_model(tmp_path: Path) -> None:
    for path in sources():
        for name, call in calls(path):
            for keyword in call.keywords:
                if keyword.arg == "trust_remote_code":
                    assert ast.unparse(keyword.value) == "False", f"{path}: {name}"
    from jaxserve.models.loading import open_source

    model = cases.write_checkpoint(tmp_path / "model", "llama")
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    open_source(str(model), "auto")
    assert not (tmp_path / "ran").exists()


def test_the_server_guards_without_asserts() -> None:
    """They vanish under python -O."""
    for path in (ROOT / "server").rglob("*.py"):
        asserts = [node.lineno for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Assert)]
        assert not asserts, f"{path}: {asserts}"


def test_nothing_opens_an_address() -> None:
    for path in sources():
        name = str(path.relative_to(ROOT))
        found = {module for module in imports(path) if any(module == m or module.startswith(f"{m}.") for m in OPENS_ADDRESSES)}
        assert not found or name in MAY_CONNECT, f"{name} imports {found}"


def test_what_the_table_names_is_there() -> None:
    """SECURITY.md: every test and file that it names exists."""
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    missing = [name for name in re.findall(r"\btest_\w+(?!\.py|\w)", text) if f"def {name}(" not in tests]
    files = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    missing += [name for name in re.findall(r"\btest_\w+\.py", text) if name not in files]
    missing += [name for name in re.findall(r"\b(?:server|jaxserve)/[\w/]*\.py", text) if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("name", ["model.bin", "pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused(tmp_path: Path, name: str) -> None:
    from jaxserve.errors import ModelLoadError
    from jaxserve.models.loading import describe_model, load_weights, open_source

    model = cases.write_checkpoint(tmp_path / "model", "llama")
    for path in model.glob("*.safetensors*"):
        path.unlink()
    (model / name).write_bytes(b"\x80\x04N.")
    with pytest.raises(ModelLoadError, match="safetensors"):
        source = open_source(str(model), "auto")
        import jax.numpy as jnp

        load_weights(
            source, describe_model(source, dtype=jnp.dtype("float32"), kv_repeat=lambda heads: 1), sharding_for=None, seed=0
        )
