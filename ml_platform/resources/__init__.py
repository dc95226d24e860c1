"""What the assets work with: the lake, the Spark engine, MLflow."""
