"""MLflow packaging of a model file: needs only its pinned requirements, no Java, Spark or pickles."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spark_jobs import training
from spark_jobs.training.learners import LEARNERS, Scorer

if TYPE_CHECKING:
    import pandas

#: Modules of `spark_jobs.training` packaged with the model; MLflow loads the last one.
PACKAGED_MODULES = ("learners.py", "pyfunc.py")

#: Platforms with and without a CPU-only wheel of XGBoost; as in pyproject.toml.
HAS_CPU_WHEEL = "sys_platform == 'win32' or (sys_platform == 'linux' and platform_machine == 'x86_64')"
HAS_NO_CPU_WHEEL = "sys_platform != 'win32' and (sys_platform != 'linux' or platform_machine != 'x86_64')"

#: Requirements of every model, and additional ones per library.
COMMON_REQUIREMENTS = ("mlflow", "numpy", "pandas")
LIBRARY_REQUIREMENTS: Mapping[str, tuple[str, ...]] = {
    "xgboost": (
        f"xgboost-cpu=={{xgboost}} ; {HAS_CPU_WHEEL}",
        f"xgboost=={{xgboost}} ; {HAS_NO_CPU_WHEEL}",
        "scipy=={scipy}",
    )
}

#: Rows of the input example.
EXAMPLE_ROWS = 5


def save_model(target: Path, model_file: bytes, example: pandas.DataFrame) -> None:
    """Package a model file as an MLflow model (flavour ``python_function``).

    Args:
        target: directory to create.
        model_file: output of `Scorer.to_json`.
        example: held-out rows with the model's inputs.
    """
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    scorer = Scorer.from_json(model_file)
    reasons = [ColSpec(kind, f"{name}_{n}", required=False) for n in (1, 2, 3) for name, kind in _REASON_COLUMNS]
    signature = ModelSignature(
        inputs=Schema([ColSpec("double", name) for name in scorer.features]),
        outputs=Schema([ColSpec("double", "score"), *reasons]),
        params=ParamSchema([ParamSpec("reasons", "long", 0)]),
    )
    with tempfile.TemporaryDirectory(prefix="ml-platform-") as directory:
        package = _package(Path(directory))
        data = Path(directory) / "model.json"
        data.write_bytes(model_file)
        mlflow.pyfunc.save_model(
            str(target),
            loader_module=f"{package.name}.{Path(PACKAGED_MODULES[-1]).stem}",
            data_path=str(data),
            code_paths=[str(package)],
            signature=signature,
            input_example=example[scorer.features].head(EXAMPLE_ROWS).astype("float64"),
            pip_requirements=requirements(scorer.learner),
        )


_REASON_COLUMNS = (("reason", "string"), ("contribution", "double"))


def requirements(learner: str) -> list[str]:
    """Pip requirements of a model of `learner`, pinned to the installed versions."""
    library = LEARNERS[learner].library
    pinned = [f"{name}=={version(name)}" for name in COMMON_REQUIREMENTS]
    if library is not None:
        import importlib

        versions = {library: importlib.import_module(library).__version__, "scipy": version("scipy")}
        pinned += [line.format(**versions) for line in LIBRARY_REQUIREMENTS[library]]
    return pinned


def _package(directory: Path) -> Path:
    """Create a package of the model's modules, with a name derived from their content.

    A process may load models of several versions of the platform; the unique name keeps their modules apart.
    """
    sources = [Path(training.__file__).parent / name for name in PACKAGED_MODULES]
    name = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    package = directory / f"fraud_scorer_{name}"
    package.mkdir()
    (package / "__init__.py").touch()
    for source in sources:
        shutil.copy(source, package)
    return package


def read_model_file(directory: Path) -> bytes:
    """Read the model file of a downloaded MLflow model without running its code. Raises FileNotFoundError."""
    return (directory / "data" / "model.json").read_bytes()


def partition_datasets(partitions: Mapping[str, Mapping[str, Any]]) -> tuple[list[Any], list[dict[str, str]]]:
    """Training partitions as MLflow datasets, with tags for each.

    `partitions`: key → ``uri`` of its features, ``rows``, and ``fingerprint`` of its raw file.
    """
    import warnings

    from mlflow.data.dataset_source_registry import resolve_dataset_source
    from mlflow.data.meta_dataset import MetaDataset

    datasets, tags = [], []
    for key, partition in partitions.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MLflow warns that a local path matches two equivalent source types
            source = resolve_dataset_source(partition["uri"].replace("s3a://", "s3://", 1))
        # MLflow limits a digest to 36 characters.
        digest = hashlib.sha256(partition["fingerprint"].encode()).hexdigest()[:32]
        datasets.append(MetaDataset(source, name=key, digest=digest))  # type: ignore[abstract]
        tags.append({"fingerprint": partition["fingerprint"], "rows": str(partition["rows"])})
    return datasets, tags
