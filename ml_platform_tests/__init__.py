"""Tests of ml_platform and spark_jobs."""
