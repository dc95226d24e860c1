"""PySpark jobs of the platform: plain functions from a request to a report, free of Dagster.

Each module is a job, ``run(spark, request) -> report``, and a script for ``spark-submit``. They need PySpark and
numpy alone and run on Python 3.8 / Spark 3.0.3 (the stock cluster image) up to the newest Spark.
"""
