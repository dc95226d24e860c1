"""Tests of the pages of Dagster's and MLflow's UIs, in a real browser: `make test-ui`."""
