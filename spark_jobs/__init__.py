"""PySpark jobs of the platform: plain functions from a request to a report, without Dagster.

Each module is a job, ``run(spark, request) -> report``, and a script for ``spark-submit``. They need
PySpark, numpy, pandas, PyArrow, scikit-learn and scipy, which the stock cluster images have, and run on Python 3.8 and
Spark 3.0.3 up to the newest Spark.
"""
