"""Spark: how jobs are run, on this machine or another cluster, and what they carry."""
