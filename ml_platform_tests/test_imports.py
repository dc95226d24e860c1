"""Which module may import which: the layers of the platform, and what the Spark jobs may rely on."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: From the bottom up. A module imports from its own layer or below; the first name that fits counts.
LAYERS = [
    ("escaping", "settings"),
    ("lake", "spark", "dataproc", "operations", "model", "dev"),
    ("assets", "checks", "jobs", "planning", "sensors"),
    ("definitions",),
    ("cli",),
]
#: The images have pandas and PyArrow, through which rows come to Python, and scikit-learn; XGBoost comes with the code.
ON_THE_CLUSTER = {"pyspark", "py4j", "numpy", "pandas", "pyarrow", "sklearn", "xgboost", "spark_jobs"}


def modules_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


IN_COPIES_OF_THE_IMAGES = [*modules_of("ml_platform_tests/spark"), *modules_of("ml_platform_tests/images")]


def dotted(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def type_checking_lines(tree: ast.Module) -> set[int]:
    """Lines that only a type checker sees."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for statement in node.body:
                lines.update(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
    return lines


def imports_of(path: Path, *, typing_too: bool = False) -> Iterator[str]:
    """Modules that a module imports anywhere, in functions too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = set() if typing_too else type_checking_lines(tree)
    for node in ast.walk(tree):
        if getattr(node, "lineno", 0) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # pyfunc.py stands beside learners.py in MLflow's models, too, in a package of another name.
            assert node.level == (path.name == "pyfunc.py" and node.module == "learners"), f"{path}:{node.lineno}"
            assert node.module is not None
            package = f"{dotted(path.parent)}." if node.level else ""
            yield from (f"{package}{node.module}.{alias.name}" for alias in node.names)


def layer_of(module: str) -> int | None:
    parts = module.split(".")
    if parts[0] != "ml_platform" or len(parts) == 1:
        return None
    return next((number for number, names in enumerate(LAYERS) if parts[1] in names), None)


def test_every_module_has_a_layer():
    assert not [
        name for path in modules_of("ml_platform") if (name := dotted(path)) != "ml_platform" and layer_of(name) is None
    ]


@pytest.mark.parametrize("path", modules_of("ml_platform"), ids=dotted)
def test_imports_run_downwards(path: Path):
    own = layer_of(dotted(path))
    upward = [
        name
        for name in imports_of(path, typing_too=True)
        if name.startswith("ml_platform.") and own is not None and (layer_of(name) or 0) > own
    ]
    assert not upward


def test_no_circle_of_imports():
    names = {dotted(path) for path in modules_of("ml_platform")}
    graph = {
        dotted(path): {
            target
            for name in imports_of(path)
            for target in (name, name.rpartition(".")[0])
            if target in names - {"ml_platform", dotted(path)}
        }
        for path in modules_of("ml_platform")
    }
    while leaves := {name for name, targets in graph.items() if not targets}:
        graph = {name: targets - leaves for name, targets in graph.items() if name not in leaves}
    assert not graph


@pytest.mark.parametrize("path", modules_of("spark_jobs"), ids=dotted)
def test_spark_jobs_run_on_the_clusters_stock_image(path: Path):
    foreign = {name.split(".")[0] for name in imports_of(path)} - set(sys.stdlib_module_names) - ON_THE_CLUSTER
    assert not foreign


@pytest.mark.parametrize("path", IN_COPIES_OF_THE_IMAGES, ids=dotted)
def test_what_is_tested_in_copies_of_the_images_needs_nothing_of_the_platform(path: Path):
    """The simulator makes the raw files, before, in the project's own environment."""
    own = {"ml_platform.dev.simulator.Simulation"} if path.name == "full_pass.py" else set()
    found = {name for name in imports_of(path) if re.match(r"(dagster|ml_platform)\b", name)}
    assert {name for name in found if not name.startswith("ml_platform_tests.images")} == own


@pytest.mark.parametrize(("image", "spark"), [("2.0", "3.0.3"), ("2.1", "3.3.2")])
def test_the_copies_of_the_images_have_their_spark_and_not_what_clusters_get(image: str, spark: str):
    pins = (ROOT / f"ml_platform_tests/images/{image}.txt").read_text().splitlines()
    assert f"pyspark=={spark}" in pins
    assert not [pin for pin in pins if pin.startswith("xgboost")]


@pytest.mark.parametrize("path", [*modules_of("spark_jobs"), *IN_COPIES_OF_THE_IMAGES], ids=dotted)
def test_spark_jobs_are_python_3_8(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
    # Without it, `X | None` in a signature is evaluated, and fails there.
    statements = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    uses_annotations = any(
        isinstance(node, (ast.FunctionDef, ast.AnnAssign))
        and (getattr(node, "annotation", None) or getattr(node, "returns", None))
        for node in ast.walk(tree)
    )
    assert statements or not uses_annotations
    newer = {"removeprefix", "removesuffix", "bit_count", "pairwise", "batched"}
    assert not {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & newer


@pytest.mark.parametrize("path", [path for path in modules_of("ml_platform") if path.name != "settings.py"], ids=dotted)
def test_only_the_settings_read_the_environment(path: Path):
    reads = [
        f"{path.name}:{node.lineno} {ast.unparse(node)}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "os"
        and node.attr in ("environ", "getenv")
    ]
    assert not reads
