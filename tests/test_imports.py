"""Imports inside the package go downwards only, from a package to those below it, and never in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "hf_dspark"
# From the lowest to the highest; a package imports from those before it, and freely within itself as long as no circle closes.
LAYERS = (
    "errors", "version", "utils", "integration", "hub", "configuration_dspark", "cache", "targets", "budgets", "calibration", "adapters",
    "checkpoints", "models", "decoding", "training", "evaluation", "cli", "__init__", "__main__",
)  # fmt: skip
LARGEST_ROOT = 6


def module_name(path: Path, source: Path = SOURCE) -> str:
    """`cache.kv_cache` for a file below `source`; a package is named by its folder."""
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(path: Path, modules: set[str], source: Path = SOURCE) -> set[str]:
    """Modules of the package that a file imports anywhere: at its top, under TYPE_CHECKING, and inside functions."""
    own = ["hf_dspark", *path.relative_to(source).with_suffix("").parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*own[: len(own) - node.level], *filter(None, [node.module])] if node.level else (node.module or "").split(".")
            names = [".".join([*base, alias.name]) for alias in node.names]
        for name in names:
            if name.split(".")[0] != "hf_dspark":
                continue
            parts = name.split(".")[1:]
            while parts and ".".join(parts) not in modules:
                parts.pop()
            found.add(".".join(parts) or "__init__")
    return found - {module_name(path, source)}


def graph(source: Path = SOURCE) -> dict[str, set[str]]:
    """Every module of the package, and those that it imports."""
    files = {module_name(path, source): path for path in sorted(source.rglob("*.py"))}
    return {name: imports(path, set(files), source) for name, path in files.items()}


def upward(edges: dict[str, set[str]]) -> list[str]:
    """Imports from a higher layer."""
    order = {layer: place for place, layer in enumerate(LAYERS)}
    pairs = [(name, other) for name, others in edges.items() for other in sorted(others)]
    return [f"{name} -> {other}" for name, other in pairs if order[name.split(".")[0]] < order[other.split(".")[0]]]


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The modules that are left when those that import nothing that is left are taken away, again and again."""
    left = {name: set(others) for name, others in edges.items()}
    while gone := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in gone}
    return sorted(left)


def test_every_module_belongs_to_a_layer():
    """A new package or root module has to be given its place."""
    assert {name.split(".")[0] for name in graph()} == set(LAYERS)


def test_no_module_imports_from_a_higher_layer():
    """Imports at the top, under TYPE_CHECKING and inside functions all go downwards."""
    assert upward(graph()) == []


def test_no_circle_of_imports():
    """Within a package, too, no module reaches itself."""
    assert circle(graph()) == []


def test_the_root_holds_few_modules():
    """What belongs to a package does not lie in the root."""
    assert len(list(SOURCE.glob("*.py"))) <= LARGEST_ROOT


@pytest.mark.parametrize("line", ["from hf_dspark.cli import main", "def f():\n    from ..cli import main", "import hf_dspark.cli"])
def test_an_upward_import_is_seen(tmp_path, line):
    """Negative control: the rule's own test sees such a line wherever it stands."""
    for name, text in (("cli/__init__.py", ""), ("utils/__init__.py", ""), ("utils/files.py", line)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert upward(graph(tmp_path)) == ["utils.files -> cli"]


def test_a_circle_is_seen(tmp_path):
    """Negative control: two modules of one package that import each other."""
    (tmp_path / "utils").mkdir()
    for one, other in (("a", "b"), ("b", "a")):
        (tmp_path / "utils" / f"{one}.py").write_text(f"def f():\n    from hf_dspark.utils.{other} import g\n")
    assert circle(graph(tmp_path)) == ["utils.a", "utils.b"]
