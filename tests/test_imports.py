"""The layers of the project: who may import whom, read from the source without running it.

Layers, low to high: `types weights keys status ledger noise threefry placement` < `feynman_kac` < `program` <
`engine` < `result ...` < `run`. A module imports its own layer, lower ones, and `kernels/`.
"""

import ast
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: Room or module directly in `smcscale/` -> its layer. A new module adds its name here.
LAYERS = {
    name: layer
    for layer, names in enumerate(
        (
            "types weights keys status ledger noise threefry placement",
            "feynman_kac",
            "program",
            "engine",
            "readout result diagnostics summary arviz_export plot progress saving",
            "drive",
            "run",
            "__init__ __main__",
        )
    )
    for name in names.split()
}
NUMPYRO_MAY_BE_IMPORTED_BY = ("smcscale.program.", "smcscale.engine.pmcmc")
KERNELS_MAY_IMPORT = ("smcscale.types", "smcscale.weights", "smcscale.keys", "smcscale.kernels")
LONGEST = 400


class Import(NamedTuple):
    """`source` imports `target` at `line`; `inside` a function or at the top of the module."""

    source: str
    target: str
    line: int
    inside: bool


def modules() -> dict[str, Path]:
    """Every module of the project by its installed name."""
    found = {}
    for folder, name in (
        ("smcscale", "smcscale"),
        ("kernels", "smcscale.kernels"),
        ("models", "smcscale.models"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((name, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}


def is_module(name: str) -> bool:
    return name in MODULES


def imports(name: str) -> list[Import]:
    """All imports of one module; `from p import m` counts as `p.m` when that is a module."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    found = []

    def visit(node, inside):
        if isinstance(node, ast.Import):
            found.extend(Import(name, a.name, node.lineno, inside) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = "." * node.level + base
            for a in node.names:
                full = f"{base}.{a.name}"
                found.append(Import(name, full if is_module(full) else base, node.lineno, inside))
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(tree, False)
    return found


IMPORTS = [found for name in MODULES for found in imports(name)]


def room(name: str) -> str:
    """`smcscale.engine.step` -> `engine`; `smcscale` -> `__init__`."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def report(wrong: list[Import], rule: str) -> None:
    lines = [f"{MODULES[i.source].relative_to(ROOT)}:{i.line} imports {i.target}" for i in wrong]
    assert not wrong, rule + "\n" + "\n".join(lines)


def in_engine(name: str) -> bool:
    return not name.startswith(("smcscale.kernels", "smcscale.models"))


def test_every_module_has_a_layer():
    rooms = {room(name) for name in MODULES if in_engine(name)}
    assert rooms <= set(LAYERS), f"give {rooms - set(LAYERS)} a layer in LAYERS"


def test_modules_import_their_own_layer_or_lower_ones():
    wrong = [
        i
        for i in IMPORTS
        if in_engine(i.source)
        and i.target.startswith("smcscale.")
        and in_engine(i.target)
        and LAYERS[room(i.target)] > LAYERS[room(i.source)]
    ]
    report(wrong, "a lower layer imports a higher one")


def test_kernels_import_types_weights_and_keys_only():
    wrong = [
        i
        for i in IMPORTS
        if i.source.startswith("smcscale.kernels")
        and i.target.startswith("smcscale")
        and not i.target.startswith(KERNELS_MAY_IMPORT)
    ]
    report(wrong, f"kernels import {KERNELS_MAY_IMPORT} only")


def test_nothing_below_imports_models():
    wrong = [
        i
        for i in IMPORTS
        if not i.source.startswith("smcscale.models")
        and i.target.startswith("smcscale.models")
        and not (i.source == "smcscale.__main__" and i.inside)
    ]
    report(wrong, "models/ is imported by __main__ alone, inside a command's function")


def test_numpyro_stays_in_the_front_end():
    wrong = [
        i
        for i in IMPORTS
        if not i.source.startswith("smcscale.models")
        and i.target.split(".")[0] == "numpyro"
        and not (i.source + ".").startswith(NUMPYRO_MAY_BE_IMPORTED_BY)
    ]
    report(wrong, "NumPyro is imported by program/ and engine/pmcmc.py alone")


def test_the_project_imports_submodules_not_the_front_door():
    wrong = [
        i
        for i in IMPORTS
        if i.target == "smcscale" or i.target.startswith(".") or i.target in ("kernels", "models")
    ]
    report(wrong, "inside the project import submodules: from smcscale.types import Tilt")


def test_heavy_extras_are_imported_inside_functions():
    extras = {
        "arviz",
        "arch",
        "statsmodels",
        "matplotlib",
        "openai",
        "torch",
        "transformers",
        "sklearn",
    }
    wrong = [i for i in IMPORTS if i.target.split(".")[0] in extras and not i.inside]
    report(wrong, "packages of an extra are imported where they are used")


@pytest.mark.parametrize("name", [n for n in MODULES if n not in PACKAGES])
def test_modules_stay_short(name):
    lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST, f"{name} has {lines} lines: two ideas?"


@pytest.mark.parametrize("name", MODULES)
def test_modules_say_what_they_are(name):
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{name} has no docstring"
