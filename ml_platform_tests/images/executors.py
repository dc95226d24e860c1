"""A test of executors of their own, as on a cluster: in the other tests of the jobs the driver does their work.

scripts/test_images.sh names this file for image 2.0, whose Spark does not itself set the property that Arrow needs.
`make test` does not find it: today's Spark has such executors in test_engines.py.
"""

import os
import subprocess
import sys

import pytest

from spark_jobs.runtime import START_PROPERTIES

SHORT_LIVED = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"

ROWS_THROUGH_ARROW = """
import sys
from pyspark.sql import SparkSession

def unchanged(frames):
    yield from frames

builder = SparkSession.builder.master("local-cluster[1,1,512]")
for pair in sys.argv[1:]:
    builder = builder.config(*pair.split("=", 1))
spark = builder.getOrCreate()
print(spark.range(1000).mapInPandas(unchanged, "id long").count(), "rows")
spark.stop()
"""


@pytest.mark.spark
@pytest.mark.images
def test_rows_pass_through_arrow_where_executors_have_the_properties_of_the_jobs(tmp_path):
    properties = {
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.host": "127.0.0.1",
        "spark.executor.memory": "512m",
        "spark.ui.enabled": "false",
        # Besides the jobs' own, which are the defaults.
        "spark.driver.extraJavaOptions": SHORT_LIVED,
        "spark.executor.extraJavaOptions": SHORT_LIVED,
        **START_PROPERTIES,
    }
    # Java options of these tests' own would reach the executors, too.
    environment = {name: value for name, value in os.environ.items() if name != "JAVA_TOOL_OPTIONS"}
    arguments = ["=".join(pair) for pair in properties.items()]
    done = subprocess.run(
        [sys.executable, "-c", ROWS_THROUGH_ARROW, *arguments],
        cwd=str(tmp_path),
        env={**environment, "PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"},
        capture_output=True,
        check=False,
        text=True,
        timeout=300,
    )
    # Some Sparks log to the standard output, too.
    assert done.stdout.splitlines()[-1:] == ["1000 rows"], done.stderr[-3000:]
