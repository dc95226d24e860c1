"""What the Spark jobs may rely on, where import-linter and ruff (pyproject.toml) cannot check it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parent.parent

#: The images have these, except XGBoost, which comes with the code.
ON_THE_CLUSTER = {"pyspark", "py4j", "numpy", "pandas", "pyarrow", "scipy", "sklearn", "xgboost"}


def test_spark_jobs_import_what_the_clusters_image_has():
    graph = grimp.build_graph("spark_jobs", include_external_packages=True, exclude_type_checking_imports=True)
    packages = {module.split(".")[0] for module in graph.modules} - {"spark_jobs"}
    assert "pyspark" in packages
    assert packages - set(sys.stdlib_module_names) <= ON_THE_CLUSTER


@pytest.mark.parametrize("package", ["spark_jobs", "ml_platform_tests/spark", "ml_platform_tests/images"])
def test_no_method_is_newer_than_python_3_8(package: str):
    """Ruff knows the syntax of 3.8 only; `make test-images` runs all of it on 3.8, where there is one."""
    newer = re.compile(r"\.(removeprefix|removesuffix|bit_count|pairwise|batched)\b")
    assert [path.name for path in (ROOT / package).rglob("*.py") if newer.search(path.read_text())] == []


@pytest.mark.parametrize(("image", "version"), [("2.0", "3.0.3"), ("2.1", "3.3.2")])
def test_copies_of_the_images_have_their_spark_and_not_what_comes_with_the_code(image: str, version: str):
    pins = (ROOT / f"ml_platform_tests/images/{image}.txt").read_text().splitlines()
    assert f"pyspark=={version}" in pins
    assert not [pin for pin in pins if pin.startswith("xgboost")]
