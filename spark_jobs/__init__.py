"""PySpark jobs of the platform: plain functions from a request to a report, without Dagster.

Each module is a job, ``run(spark, request) -> report``, and a script for ``spark-submit``. They need only
PySpark and numpy and run on Python 3.8 / Spark 3.0.3 (the stock cluster image) up to the newest Spark.
"""
