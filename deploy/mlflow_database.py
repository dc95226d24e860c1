#!/usr/bin/env python3
"""Create MLflow's tables in the database that MLFLOW_BACKEND_STORE_URI names, or bring them to this MLflow's version.

Does nothing if they are of this version. Stop MLflow's server and make a backup first: an upgrade may not be undone.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Do it; exits with a message if the variable is missing or the database refuses."""
    uri = os.environ.get("MLFLOW_BACKEND_STORE_URI")  # noqa: TID251 - runs alone, in the MLflow container
    if not uri:
        sys.exit("mlflow_database: set MLFLOW_BACKEND_STORE_URI, e.g. postgresql+psycopg2://mlflow@host:5432/mlflow")
    import sqlalchemy

    # First a look, whose failure is one line: MLflow itself tries for a minute, and ends with a stack.
    try:
        sqlalchemy.create_engine(uri).connect().close()
    except sqlalchemy.exc.DBAPIError as error:
        sys.exit(f"mlflow_database: {str(error.orig).splitlines()[0]}")
    except sqlalchemy.exc.ArgumentError:
        sys.exit("mlflow_database: MLFLOW_BACKEND_STORE_URI is no address of a database")
    from mlflow.db import commands

    # The command is called in this process: on a command line everybody could read the address, maybe with a password.
    try:
        commands.main(["upgrade", uri], prog_name="mlflow db")
    except sqlalchemy.exc.DBAPIError as error:
        sys.exit(f"mlflow_database: the tables cannot be upgraded: {str(error.orig).splitlines()[0]}")


if __name__ == "__main__":
    main()
