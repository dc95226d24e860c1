"""Exchange of rows as numpy columns, and Parquet files written by pyarrow."""
