"""A run in a process of its own, for tests that interrupt it: ``python -m ml_platform_tests.interrupted_run JSON``.

The JSON has fields of `LakeResource` ("lake") and of `DataprocEngine` ("engine"). DAGSTER_HOME is where the run is.
"""

from __future__ import annotations

import json
import sys

import dagster as dg

from ml_platform.dataproc.engine import DataprocEngine
from ml_platform.lake.partitions import range_tags
from ml_platform.lake.resource import LakeResource
from ml_platform_tests.fakes_cloud import small_job


def main() -> None:
    settings = json.loads(sys.argv[1])
    lake, engine = LakeResource(**settings["lake"]), DataprocEngine(**settings["engine"])
    job = small_job(lake, engine, "cleaned_transactions")
    with dg.DagsterInstance.get() as instance:
        job.execute_in_process(
            instance=instance,
            run_id=settings["run_id"],
            tags=range_tags("a", "a"),
            raise_on_error=False,
        )


if __name__ == "__main__":
    main()
