"""A Dagster platform that keeps a fraud model fresh as raw transaction files arrive."""
