"""What stands between a registered version and the alias ``champion``: the comparison, and the proof that it loads."""

import json
import tempfile
from contextlib import suppress
from datetime import date, datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from ml_platform.lake.resource import LakeResource, SchemaVersionError
from ml_platform.model.config import PromotionConfig
from ml_platform.model.mlflow import MODEL_NAME, MlflowResource, hide_progress_bars
from ml_platform.model.packaging import read_model_file
from ml_platform.model.promotion import DECIDED_BY_FIGURES, Decision, Facts, Scores, decide
from spark_jobs.training.learners import LEARNERS, ModelError, Scorer, installed_version, is_newer, matrix_of

if TYPE_CHECKING:
    import pandas
    from mlflow.entities.model_registry import ModelVersion

#: Scores that a reloaded model may differ by.
SAME_SCORE = 1e-9

DECISION_FILE = "promotion.json"

#: What a run found of the champion's health.
HEALTH_FILE = "champion.json"

#: Version of what is in these two. A file that names none is of version 1: the first ones did not.
FINDINGS_VERSION = 1

#: Tag of a version that was loaded back from MLflow and scored rows as it did when it was trained.
PROOF_TAG = "reload_proof"

#: Tags that hold an instant: since when a version is champion, and when a challenger was last compared with it.
SINCE_TAG = "champion_since"
COMPARED_TAG = "champion_compared"
INSTANT = "%Y-%m-%dT%H:%M:%SZ"


def judge(
    config: PromotionConfig, seed: int, lake: LakeResource, scores_name: str, report: dict[str, Any], champion: Any
) -> Decision:
    """Decide by the scores that the training job wrote to `scores_name` in the lake."""
    windows = report["windows"]
    facts = Facts(
        challenger_features=tuple(report["features"]),
        challenger_train_last_date=date.fromisoformat(windows["train"]["last_date"]),
        test_first_date=date.fromisoformat(windows["test"]["first_date"]),
    )
    if champion is not None:
        verdict = report["champion"] or {"status": "unreadable", "error": champion_problem(champion)}
        facts = Facts(
            champion=champion.version,
            champion_error=None if verdict["status"] == "scored" else verdict["error"],
            champion_newer_library=verdict["status"] == "newer_library",
            champion_features=tuple(features_of(champion)) or None,
            champion_train_last_date=_last_date_of(champion),
            challenger_features=facts.challenger_features,
            challenger_train_last_date=facts.challenger_train_last_date,
            test_first_date=facts.test_first_date,
        )
    return decide(config, read_scores(lake, scores_name, with_champion=facts.champion_error is None), facts, seed)


def read_finding(lake: LakeResource, name: str) -> dict[str, Any]:
    """What DECISION_FILE or HEALTH_FILE beside a model says.

    Raises:
        FileNotFoundError: there is none.
        SchemaVersionError: it is of a version that this one does not know.
    """
    found: dict[str, Any] = lake.read_json(name)
    version = found.get("schema_version", 1)
    if version not in range(1, FINDINGS_VERSION + 1):
        raise SchemaVersionError(
            f"{name} in {lake.lake_uri} is of schema {version!r}, and this version of ml_platform knows up to "
            f"{FINDINGS_VERSION}: run the version that wrote it, or set ML_PLATFORM_LAKE_URI to another lake"
        )
    return found


def features_of(version: "ModelVersion") -> list[str]:
    """The inputs of a version, by its tag; none where that does not name them, for anybody may edit it in MLflow."""
    try:
        features = json.loads(version.tags["features"])
    except (KeyError, ValueError):
        return []
    return features if isinstance(features, list) and all(isinstance(name, str) for name in features) else []


def champion_problem(version: "ModelVersion") -> str | None:
    """Why a version cannot score with this platform, by its tags; None if nothing in them speaks against it."""
    name = f"version {version.version}"
    if not version.tags.get("model_uri", "").endswith(".json"):
        if "spark_version" in version.tags:
            return (
                f"{name} is a Spark ML pipeline of an earlier version of ml_platform, with which this one "
                "cannot score; the next run trains a successor"
            )
        return f"{name} does not name its model file in its tags"
    if not features_of(version):
        return f"{name} does not name its inputs in its tags"
    learner = LEARNERS.get(version.tags.get("learner", ""))
    if learner is not None and learner.library is not None:
        wrote, own = version.tags.get("library_version", ""), installed_version(learner.library)
        with suppress(ModelError):  # anybody may have edited the tag
            if is_newer(wrote, own):
                return (
                    f"{name} was written by {learner.library} {wrote}, which the older {own} at hand would misread: "
                    f"install {learner.library} {wrote}, or choose another version"
                )
    return None


def _last_date_of(version: "ModelVersion") -> date | None:
    """The last day that a version was trained on, by its tag; None where that does not name it."""
    try:
        return date.fromisoformat(version.tags["train_last_date"])
    except (KeyError, ValueError):
        return None


def read_scores(lake: LakeResource, name: str, *, with_champion: bool = True) -> Scores:
    """The held-out rows of a model, from the Parquet that the training job wrote."""
    import numpy as np
    from pyarrow import parquet

    with tempfile.TemporaryDirectory(prefix="ml-platform-") as directory:
        lake.store.download(name, Path(directory))
        files = sorted(Path(directory).glob("part-*.parquet"))
        columns = ["tx_fraud", "score", "champion_score", "customer_id"]
        tables = [parquet.read_table(file, columns=columns) for file in files]
    values = {column: np.concatenate([table[column].to_numpy() for table in tables]) for column in columns}
    scored = with_champion and not np.isnan(values["champion_score"].astype("float64")).any()
    return Scores(
        label=values["tx_fraud"],
        challenger=values["score"],
        champion=values["champion_score"] if scored else None,
        customer_id=values["customer_id"].astype("float64"),
    )


def verify_reload(lake: LakeResource, mlflow: MlflowResource, *, version: "ModelVersion", sample_name: str) -> None:
    """Load a registered version back from MLflow, let it score held-out rows again, and note that it did as PROOF_TAG.

    The rows are those of `sample_name` in the lake, with the scores of the training. Only the model file is read: what
    else is in MLflow may have been put there by anybody.

    Raises:
        dagster.Failure: the version does not load, or scores differ.
    """
    import mlflow as mlflow_api
    import numpy as np

    hide_progress_bars()
    with tempfile.TemporaryDirectory(prefix="ml-platform-") as target:
        mlflow_api.set_tracking_uri(mlflow.tracking_uri)
        mlflow_api.set_registry_uri(mlflow.tracking_uri)
        path = mlflow_api.artifacts.download_artifacts(
            artifact_uri=f"models:/{MODEL_NAME}/{version.version}", dst_path=target
        )
        try:
            scorer = Scorer.from_json(read_model_file(Path(path)))
        except (OSError, ModelError) as error:
            raise dg.Failure(
                f"version {version.version} does not load back from MLflow: {error}; the champion stays",
                allow_retries=False,
            ) from None
    sample = read_sample(lake, sample_name)
    differences = np.abs(scorer.score(matrix_of(sample, scorer.features)) - sample["score"].to_numpy())
    if len(differences) == 0 or not differences.max() <= SAME_SCORE:  # nor if it is no number
        raise dg.Failure(
            f"version {version.version}, loaded back from MLflow, scores {len(differences)} rows by up to "
            f"{differences.max(initial=0)} otherwise than when it was trained; the champion stays",
            allow_retries=False,
        )
    proof = f"{len(differences)} rows scored again, largest difference {differences.max()}"
    mlflow.tag_version(version.version, {PROOF_TAG: proof})


def read_sample(lake: LakeResource, name: str) -> "pandas.DataFrame":
    """The held-out rows that a training left beside its model: ids, inputs and score."""
    import io

    import pandas

    return pandas.read_parquet(io.BytesIO(lake.store.read(name)))


def note_health(
    config: PromotionConfig,
    lake: LakeResource,
    mlflow: MlflowResource,
    directory: str,
    champion: "ModelVersion | None",
    *,
    outcome: str,
    reason: str,
    average_precision: float | None = None,
    replaced: bool = False,
) -> None:
    """Write to HEALTH_FILE what the check on the champion's health looks at, and note a comparison as COMPARED_TAG.

    `outcome` is the gate's, or the training's where there was no challenger; `average_precision` the champion's, on
    the held-out rows.
    """
    if champion is None:
        return
    now = datetime.now(timezone.utc)
    # One that was made the champion in MLflow itself has none of our tags.
    known = [datetime.fromtimestamp(champion.creation_timestamp / 1000, timezone.utc)]
    for tag in (SINCE_TAG, COMPARED_TAG):
        # Anybody may have edited them there.
        with suppress(KeyError, ValueError):
            known.append(datetime.strptime(champion.tags[tag], INSTANT).replace(tzinfo=timezone.utc))
    compared = outcome in DECIDED_BY_FIGURES
    lake.write_json(
        f"{directory}/{HEALTH_FILE}",
        {
            "schema_version": FINDINGS_VERSION,
            "version": champion.version,
            "outcome": outcome,
            "reason": reason,
            "replaced": replaced,
            "average_precision": average_precision,
            "min_average_precision": config.min_champion_average_precision,
            "days_without_comparison": 0 if compared else (now - max(known)).days,
            "max_age_days": config.max_champion_age_days,
        },
    )
    if compared and not replaced:
        mlflow.tag_version(champion.version, {COMPARED_TAG: now.strftime(INSTANT)})


def champion_tags(*, who: str, why: str) -> dict[str, str]:
    """Tags of a version that becomes the champion: since when, by whom and why."""
    since = datetime.now(timezone.utc).strftime(INSTANT)
    return {SINCE_TAG: since, "champion_by": who, "champion_why": why[:1000]}
