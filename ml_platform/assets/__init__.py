"""The assets, one module per asset, all partitioned by raw file."""
