"""Load a model from its files and compare its scores with those of its training."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from spark_jobs import runtime
from spark_jobs.schema import SCHEMA_VERSION

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger("spark_jobs")

#: About how many rows are scored again.
SAMPLE_ROWS = 1000


def run(spark: SparkSession, request: dict[str, Any]) -> dict[str, Any]:
    """Score a sample of held-out rows again.

    Request: ``run_id``; ``model_uri`` (a saved PipelineModel); ``feature_uris`` (the partitions of
    ``transaction_features`` with the scored rows); ``features``; ``scores_uri`` (``test_scores``).

    Returns ``schema_version``, ``run_id``, ``rows`` (scored again), ``max_difference`` (of a row's two scores; None
    without rows), ``spark_version``, ``seconds``. Raises if the model cannot be loaded; runtime.NewerSparkError: a
    newer Spark saved it.
    """
    from pyspark.ml.functions import vector_to_array
    from pyspark.sql import functions as F

    started = time.monotonic()
    runtime.configure(spark)
    model = runtime.load_model(spark, request["model_uri"])
    scores = runtime.read_parquet(spark, request["scores_uri"]).select("transaction_id", "score")
    share = max(1, scores.count() // SAMPLE_ROWS)
    sample = scores.where(F.expr(f"pmod(xxhash64(transaction_id), {share}) = 0"))
    features = runtime.read_parquet(spark, *request["feature_uris"])
    rows = features.select("transaction_id", *request["features"]).join(F.broadcast(sample), "transaction_id")
    again = model.transform(rows).select("score", vector_to_array(F.col("probability"))[1].alias("again"))
    found = again.agg(F.count(F.lit(1)).alias("rows"), F.expr("max(abs(score - again))").alias("difference")).first()
    assert found is not None
    log.info("model loaded back: %d rows scored again, largest difference %s", found["rows"], found["difference"])
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": request["run_id"],
        "rows": found["rows"],
        "max_difference": found["difference"],
        "spark_version": spark.version,
        "seconds": round(time.monotonic() - started, 3),
    }


if __name__ == "__main__":
    runtime.main(run, "verify_model")
