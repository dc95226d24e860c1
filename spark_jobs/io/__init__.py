"""Rows through numpy, and Parquet files without Spark's writer."""
