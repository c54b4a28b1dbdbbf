"""The shape of the source: which package may import which, what an import loads, how long files are, what a wheel holds."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKED = ("models", "server", "tpu", "pallas_kernels")

# A package may import itself and those to its right; errors.py is anybody's but pallas_kernels'.
ORDER = ("cli", "tpu", "server", "jaxserve", "models", "pallas_kernels")
TOP_FILES = ("cli",)  # files of jaxserve/ that stand above everything, with their cli_*.py

MAX_LINES = 350
LONGER: dict[str, str] = {}  # file -> why it is longer


def sources() -> list[Path]:
    """Every file of the product, once: the links in jaxserve/ lead to folders that are listed themselves."""
    folders = [ROOT / name for name in ("jaxserve", *LINKED)]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "jaxserve" else ("jaxserve", *parts)).removesuffix(".__init__")


def layer(module: str) -> str | None:
    """The package of a module of ours."""
    top, _, rest = module.partition(".")
    if top != "jaxserve":
        return None
    first = rest.split(".")[0]
    if first == "__main__" or first.split("_")[0] in TOP_FILES:
        return "cli"
    return first if first in LINKED else "jaxserve"


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at any depth; for `from a import b` also a.b, as it may be a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_links_are_links() -> None:
    for name in LINKED:
        link = ROOT / "jaxserve" / name
        assert link.is_symlink() and link.readlink() == Path("..") / name


def test_imports_go_one_way() -> None:
    wrong = []
    for path in sources():
        own = layer(module_name(path))
        assert own is not None
        for imported in imports(path):
            assert imported.split(".")[0] not in (*LINKED, "tests"), f"{path} imports {imported}: write jaxserve.{imported}"
            other = layer(imported)
            is_error = imported.startswith("jaxserve.errors") and own != "pallas_kernels"
            # `from jaxserve import x` names x next, which is what counts.
            if other is None or is_error or imported == "jaxserve":
                continue
            if ORDER.index(other) < ORDER.index(own):
                wrong.append(f"{path.relative_to(ROOT)} imports {imported}")
    assert not wrong


def loaded_after(statement: str) -> set[str]:
    """The top-level packages that a fresh interpreter holds after a statement."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


@pytest.mark.parametrize(
    "statement, unwanted",
    [
        ("import jaxserve", {"jax", "numpy", "fastapi", "transformers"}),
        ("import jaxserve.models", {"fastapi", "transformers"}),
        ("import jaxserve.sampling_params, jaxserve.config", {"jax", "transformers"}),
        ("from jaxserve import LLM", {"fastapi", "uvicorn", "pydantic", "prometheus_client", "gguf", "torch"}),
        ("import jaxserve.tokenizer", {"fastapi", "jax", "gguf", "torch", "transformers"}),
        ("import jaxserve.cli", {"jax", "fastapi", "transformers"}),
    ],
)
def test_imports_are_lazy(statement: str, unwanted: set[str]) -> None:
    assert not loaded_after(statement) & unwanted


def test_all_is_true() -> None:
    checked = 0
    for path in sources():
        if "__all__" in path.read_text(encoding="utf-8"):
            module = importlib.import_module(module_name(path))
            assert len(module.__all__) == len(set(module.__all__)), path
            assert not [name for name in module.__all__ if not hasattr(module, name)], path
            checked += 1
    assert checked


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    long = {name for name, lines in lengths.items() if lines > MAX_LINES and not name.startswith("pallas_kernels/")}
    assert long == set(LONGER)


def test_files_open_by_saying_what_they_are() -> None:
    missing = [path for path in sources() if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text("utf-8")))]
    assert not missing


def tracked() -> list[Path]:
    """What git would hold: tracked files and new ones that it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return [path for line in listed.stdout.splitlines() if (path := ROOT / line).is_file() and not path.is_symlink()]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_the_repository_stands_alone() -> None:
    """Nothing in it reads what lies beside it."""
    beside = ("../" + "shared").encode()
    assert not [path for path in tracked() if beside in path.read_bytes()]


@pytest.mark.slow
def test_a_wheel_holds_every_module_and_no_other(tmp_path: Path) -> None:
    """Built from a copy, so that no old build/ folder joins in."""
    for name in ("jaxserve", *LINKED):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "wheels", "."]
    subprocess.run(pip, cwd=tmp_path, check=True, capture_output=True)
    [wheel] = (tmp_path / "wheels").glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    inside = [path.relative_to(ROOT) for path in sources()]
    assert {name for name in names if name.endswith(".py")} == {
        (path if path.parts[0] == "jaxserve" else "jaxserve" / path).as_posix() for path in inside
    }
    assert all(name.startswith("jaxserve/") for name in names)
    assert {"jaxserve/py.typed", *(f"jaxserve/server/static/{p.name}" for p in (ROOT / "server/static").iterdir())} <= names


def test_every_module_can_be_imported() -> None:
    """On a machine without accelerators."""
    failed = []
    for module in pkgutil.walk_packages(importlib.import_module("jaxserve").__path__, "jaxserve."):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            failed.append(f"{module.name}: {error}")
    assert not failed
