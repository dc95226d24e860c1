"""The MLflow model, where nothing of this project is installed: files, requirements, HTTP, a Spark UDF."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ml_platform.dev.cloud.processes import TetheredProcess, free_port
from ml_platform.model import packaging
from ml_platform.model.packaging import read_model_file, requirements, save_model
from spark_jobs.training import pyfunc
from spark_jobs.training.learners import LEARNERS, NewerModelError, Scorer

if TYPE_CHECKING:
    import pandas as pd
    from pyspark.sql import SparkSession

FEATURES = ["amount", "risk", "noise"]

#: A version of the library that is newer than ours.
NEWER = "xgboost-cpu==3.2.0"

FIT_WITH_ANOTHER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import numpy, xgboost
assert xgboost.__file__.startswith(sys.argv[1])
from spark_jobs.training.learners import LEARNERS, Scorer
draw = numpy.random.RandomState(0)
matrix = draw.normal(size=(500, 3)).astype("f4")
label = (matrix[:, 1] + draw.normal(size=500) > 1).astype("i4")
model = LEARNERS["xgboost"].fit(matrix, label, numpy.ones(500), {"rounds": 5}, 0, 1)
print(Scorer("xgboost", ["amount", "risk", "noise"], model).to_json(), end="")
"""

LOAD_AND_PREDICT = """
import json, sys
import mlflow, pandas
model = mlflow.pyfunc.load_model(sys.argv[1])
rows = pandas.read_json(sys.argv[2], orient="split")
answer = model.predict(rows, params={"reasons": 3})
loaded = [name for name in ("pyspark", "py4j", "spark_jobs", "ml_platform", "dagster") if name in sys.modules]
print(json.dumps({"score": answer["score"].tolist(), "columns": list(answer), "loaded": loaded}))
"""


def rows(number: int = 200) -> pd.DataFrame:
    import numpy as np
    import pandas as pd

    draw = np.random.default_rng(1)
    return pd.DataFrame({name: draw.normal(size=number) for name in FEATURES})


def scorer_of(learner: str) -> Scorer:
    import numpy as np

    frame = rows(2000)
    label = (frame["risk"] + np.random.default_rng(2).normal(size=2000) > 1.5).to_numpy().astype("i4")
    model = LEARNERS[learner].fit(frame.to_numpy(), label, np.ones(2000), {}, 0, 2)
    return Scorer(learner, FEATURES, model)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An MLflow model of each learner."""
    directory = tmp_path_factory.mktemp("models of MLflow")
    for learner in LEARNERS:
        save_model(directory / learner, scorer_of(learner).to_json().encode(), rows())
    return {learner: directory / learner for learner in LEARNERS}


@pytest.fixture(params=list(LEARNERS))
def model(models: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    return models[request.param]


@pytest.fixture
def scorer(model: Path) -> Scorer:
    return Scorer.from_json(read_model_file(model))


def matrix(frame: pd.DataFrame) -> Any:
    return frame[FEATURES].to_numpy().astype("f4")


def test_predict_gives_the_probability_in_a_column(model: Path, scorer: Scorer):
    import mlflow

    frame = rows().set_index(rows().index + 1000)
    answer = mlflow.pyfunc.load_model(str(model)).predict(frame)
    assert list(answer) == ["score"]
    assert list(answer.index) == list(frame.index)
    assert (answer["score"].to_numpy() == scorer.score(matrix(frame))).all()
    shuffled = frame[["noise", "amount", "risk"]].assign(another="text")
    assert mlflow.pyfunc.load_model(str(model)).predict(shuffled).equals(answer)


def test_reasons_come_with_their_contributions(model: Path, scorer: Scorer):
    import mlflow

    answer = mlflow.pyfunc.load_model(str(model)).predict(rows(), params={"reasons": 3})
    pairs = [f"{name}_{place}" for place in (1, 2, 3) for name in ("reason", "contribution")]
    assert list(answer) == ["score", *pairs]
    parts = scorer.contributions(matrix(rows()))
    for place in (1, 2, 3):
        for row in range(len(answer)):
            name, value = answer[f"reason_{place}"][row], answer[f"contribution_{place}"][row]
            if name is None:
                assert value != value
            else:
                assert value == parts[row, FEATURES.index(name)] > 0


def test_missing_inputs_are_named(model: Path):
    import mlflow
    from mlflow.exceptions import MlflowException

    loaded = mlflow.pyfunc.load_model(str(model))
    with pytest.raises(MlflowException, match="risk"):
        loaded.predict(rows().drop(columns="risk"))
    with pytest.raises(ValueError, match="missing values in risk"):
        loaded.predict(rows().assign(risk=float("nan")))
    with pytest.raises(ValueError, match="missing columns: risk"):
        pyfunc.FraudModel(Scorer.from_json(read_model_file(model))).predict(rows().drop(columns="risk"))


def test_a_model_has_a_signature_and_an_example_and_no_pickle(model: Path):
    import mlflow

    info = mlflow.models.Model.load(str(model))
    assert info.signature is not None
    assert info.signature.inputs.input_names() == FEATURES
    outputs = {column.name: column.required for column in info.signature.outputs.inputs}
    assert outputs["score"]
    assert not outputs["reason_3"]
    assert [param.name for param in info.signature.params.params] == ["reasons"]
    example = info.load_input_example(str(model))
    assert (list(example), len(example)) == (FEATURES, 5)
    assert not [path for path in model.rglob("*") if path.suffix in (".pkl", ".pickle", ".joblib", ".bin")]


def test_requirements_serve_all_kinds_of_machines(model: Path):
    lines = (model / "requirements.txt").read_text().splitlines()
    names = {line.split("==")[0] for line in lines}
    trees = {"xgboost", "xgboost-cpu", "scipy"} if model.name == "xgboost" else set()
    assert names == {"mlflow", "numpy", "pandas"} | trees
    assert len(lines) == len(requirements(model.name))
    assert not [line for line in lines if line.startswith("xgboost") and ";" not in line]


def test_models_of_two_versions_of_the_platform_live_in_one_process(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each carries its own scorer, under a name of its own."""
    import shutil

    import mlflow

    package = tmp_path / "training"
    shutil.copytree(Path(packaging.training.__file__).parent, package)
    with (package / "learners.py").open("a") as file:
        file.write("\nScorer.score = lambda self, matrix: matrix[:, 0].astype('f8')\n")
    content = read_model_file(models["logistic_regression"])
    monkeypatch.setattr(packaging.training, "__file__", str(package / "__init__.py"))
    save_model(tmp_path / "changed", content, rows())
    before = mlflow.pyfunc.load_model(str(models["logistic_regression"])).predict(rows())["score"]
    changed = mlflow.pyfunc.load_model(str(tmp_path / "changed")).predict(rows())["score"]
    assert changed.to_numpy() == pytest.approx(matrix(rows())[:, 0])
    assert (before != changed).any()
    assert mlflow.pyfunc.load_model(str(models["logistic_regression"])).predict(rows())["score"].equals(before)


@pytest.mark.e2e
class TestElsewhere:
    """An environment made of the model's own requirements, in which nothing of this project is installed."""

    @pytest.fixture(scope="class")
    def environment(self, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
        directory = tmp_path_factory.mktemp("environment")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
        python = directory / "bin" / "python"
        for command in (
            ["uv", "pip", "install", "--quiet", "--python", str(python)],
            [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check"],
        ):
            program = Path(sys.executable).with_name(command[0])
            command[0] = str(program) if program.exists() else command[0]
            requirements_file = str(models["xgboost"] / "requirements.txt")
            done = subprocess.run(
                [*command, "-r", requirements_file], env={**os.environ, "UV_SYSTEM_CERTS": "1"}, check=False
            )
            if done.returncode == 0:
                break
        assert done.returncode == 0
        return python

    @pytest.fixture
    def clean(self, environment: Path, tmp_path: Path) -> dict[str, str]:
        """What such a process sees of this machine's environment: no Java, no path of ours."""
        return {
            "PATH": f"{environment.parent}{os.pathsep}/usr/bin{os.pathsep}/bin",
            "HOME": str(tmp_path),
            "JAVA_HOME": "/nowhere",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }

    def test_it_loads_with_only_its_own_requirements(
        self, environment: Path, clean: dict[str, str], model: Path, scorer: Scorer, tmp_path: Path
    ):
        data = tmp_path / "rows.json"
        data.write_text(rows().to_json(orient="split", double_precision=15))
        command = [str(environment), "-c", LOAD_AND_PREDICT, str(model), str(data)]
        done = subprocess.run(command, cwd=tmp_path, env=clean, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout.splitlines()[-1])
        assert answer["loaded"] == []
        assert answer["score"] == scorer.score(matrix(rows())).tolist()
        assert answer["columns"][0] == "score"
        assert answer["columns"][-1] == "contribution_3"

    @pytest.fixture
    def address(
        self, environment: Path, clean: dict[str, str], models: dict[str, Path], tmp_path: Path
    ) -> Iterator[str]:
        port = free_port()
        command = [str(environment), "-m", "mlflow", "models", "serve", "--env-manager", "local"]
        command += ["--model-uri", str(models["xgboost"]), "--host", "127.0.0.1", "--port", str(port)]
        server = TetheredProcess(command, log=tmp_path / "log", env=clean)

        def answers() -> bool:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5) as answer:
                    return bool(answer.status == 200)
            except OSError:
                return False

        try:
            server.wait_until(answers, what="mlflow models serve", timeout_s=120)
            yield f"http://127.0.0.1:{port}/invocations"
        finally:
            server.stop()

    def test_it_answers_over_http(self, address: str, models: dict[str, Path]):
        frame = rows(3)
        body = {"dataframe_split": frame.to_dict(orient="split"), "params": {"reasons": 2}}
        request = urllib.request.Request(
            address, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            predictions = json.load(response)["predictions"]
        scorer = Scorer.from_json(read_model_file(models["xgboost"]))
        assert [row["score"] for row in predictions] == scorer.score(matrix(frame)).tolist()
        names, _ = scorer.reasons(matrix(frame), 2)
        assert [[row["reason_1"], row["reason_2"]] for row in predictions] == names


@pytest.mark.spark
def test_spark_scores_with_it(spark: SparkSession, models: dict[str, Path]):
    import mlflow

    frame = rows()
    score = mlflow.pyfunc.spark_udf(spark, str(models["xgboost"]), env_manager="local", result_type="double")
    scored = spark.createDataFrame(frame).withColumn("score", score(*FEATURES)).toPandas()
    scorer = Scorer.from_json(read_model_file(models["xgboost"]))
    assert (scored["score"].to_numpy() == scorer.score(matrix(scored))).all()


@pytest.mark.e2e
def test_a_file_that_a_newer_library_wrote_is_refused(tmp_path: Path):
    """Without the check, the older library would misread the file silently."""
    import xgboost

    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*install, "--target", str(tmp_path), NEWER], check=True)
    root = Path(packaging.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", FIT_WITH_ANOTHER, str(tmp_path)], cwd=root, check=True, capture_output=True, text=True
    )
    written = json.loads(done.stdout)
    version = NEWER.partition("==")[2]
    assert written["library"]["version"] == version
    with pytest.raises(NewerModelError, match=f"xgboost {version} wrote the model, and the older xgboost"):
        Scorer.from_json(done.stdout)
    # Also with an edited header: the library itself notes its version.
    written["library"]["version"] = xgboost.__version__
    with pytest.raises(NewerModelError, match=f"xgboost {version} wrote the model"):
        Scorer.from_json(json.dumps(written))
