"""Imports run downward: no upward import, no cycle, in `src/soli` (types and imports inside functions included)."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCE = Path(__file__).parents[1] / "src"

# Lowest first: a module may import from its own layer and from those before it.
# "soli" is the package's __init__, which only offers the public names.
LAYERS = [
    ("errors",),
    ("atomic_file", "checksum", "input_files", "links", "mapped_files", "quantities"),
    ("hub",),
    (
        *("sections", "arguments", "families", "network_fields", "indexer_fields", "rope_scaling", "config_spellings"),
        *("config", "presets", "machine", "analysis"),
    ),
    ("formats", "kernels", "data"),
    ("model",),
    ("checkpoint", "experts", "parallel", "measured"),
    ("engine",),
    ("train", "chat", "eval"),
    ("llm", "llm_arguments"),
    ("serve", "plan"),
    ("recipes",),
    ("cli",),
    ("soli", "__main__"),
]
LAYER = {name: level for level, names in enumerate(LAYERS) for name in names}

class Import(NamedTuple):
    importer: str
    imported: str
    name: str | None  # of the thing imported from the module; None for the module itself

    def __str__(self) -> str:
        return f"{self.importer} -> {self.imported}"


def module_files() -> dict[str, Path]:
    """Every module of the package, by dotted name."""
    modules = {}
    for path in sorted((SOURCE / "soli").rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


MODULES = module_files()
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in MODULES.items()}


def imports_of(module: str) -> list[Import]:
    """All imports of a module, wherever in the file they stand; of a package's submodule, the submodule."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    imports = []
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            imports += [Import(module, alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join([*parents, *([source] if source else [])])
            for alias in node.names:
                submodule = f"{source}.{alias.name}"
                imports.append(
                    Import(module, submodule, None) if submodule in MODULES else Import(module, source, alias.name)
                )
    return imports


# The version is a constant of the package's __init__ that any layer may read.
IMPORTS = [item for module in MODULES for item in imports_of(module) if item[1:] != ("soli", "__version__")]
INTERNAL = [item for item in IMPORTS if item.imported in MODULES]


def part(module: str) -> str:
    """The package or top-level module that a module belongs to: `soli.model.router` to `model`."""
    return module.split(".")[1] if "." in module else module


def cycles(edges: set[tuple[str, str]]) -> list[list[str]]:
    """The strongly connected components of more than one node (Tarjan), each sorted."""
    successors: dict[str, list[str]] = {}
    for start, end in sorted(edges):
        successors.setdefault(start, []).append(end)
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = lowest[node] = len(index)
        stack.append(node)
        for successor in successors.get(node, ()):
            if successor not in index:
                visit(successor)
                lowest[node] = min(lowest[node], lowest[successor])
            elif successor in stack:
                lowest[node] = min(lowest[node], index[successor])
        if lowest[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                components.append(sorted(component))

    for node in sorted(successors):
        if node not in index:
            visit(node)
    return sorted(components)


def assert_none(violations: set[str]) -> None:
    assert not violations, "violations:\n" + "\n".join(sorted(violations))


def test_every_module_belongs_to_a_layer() -> None:
    assert {part(module) for module in MODULES} <= set(LAYER)


def test_no_import_runs_upward() -> None:
    upward = {str(item) for item in INTERNAL if LAYER[part(item.imported)] > LAYER[part(item.importer)]}
    assert_none(upward)


def test_no_import_cycle_between_modules() -> None:
    edges = {(item.importer, item.imported) for item in INTERNAL if item.importer != item.imported}
    assert_none({module for cycle in cycles(edges) for module in cycle})


def test_no_import_cycle_between_packages() -> None:
    edges = {(part(item.importer), part(item.imported)) for item in INTERNAL}
    components = cycles({edge for edge in edges if edge[0] != edge[1]})
    assert_none({package for component in components for package in component})


def test_class_names_are_unique() -> None:
    classes = Counter(node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert_none({name for name, count in classes.items() if count > 1})


FORBIDDEN = [  # (package, what it never imports)
    ("soli.model", "soli.kernels.cpu"),
    ("soli.model", "torch.distributed"),
    ("soli.model", "soli.checkpoint"),
    ("soli.train", "soli.llm"),
    ("soli", "soli.recipes.nano_corpus"),
]
EXCEPTIONS = {("soli.recipes.nano_corpus", "soli.recipes.nano_corpus"), ("soli.cli", "soli.recipes.nano_corpus")}


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def test_packages_do_not_know_what_they_must_not() -> None:
    violations = set()
    for item in IMPORTS:
        imported = item.imported if item.name is None else f"{item.imported}.{item.name}"
        for package, target in FORBIDDEN:
            excepted = any(inside(item.importer, allowed) and target == other for allowed, other in EXCEPTIONS)
            if inside(item.importer, package) and inside(imported, target) and not excepted:
                violations.add(f"{item.importer} -> {target}")
    assert_none(violations)


@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        ({("a", "b"), ("b", "c")}, []),
        ({("a", "b"), ("b", "a"), ("b", "c")}, [["a", "b"]]),
        ({("a", "b"), ("b", "c"), ("c", "a"), ("d", "e"), ("e", "d")}, [["a", "b", "c"], ["d", "e"]]),
    ],
)
def test_the_search_for_cycles_finds_them(edges: set[tuple[str, str]], expected: list[list[str]]) -> None:
    assert cycles(edges) == expected
