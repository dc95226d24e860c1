#!/bin/sh
# Creates the roles dagster and mlflow, each with a database of its own that the other cannot enter. Does nothing to
# what exists, except that a role gets the password that its file (dagster_password, mlflow_password) now holds.
#
# Speaks to the server that libpq's variables (PGHOST, PGUSER, …) name, as superuser. PostgreSQL's image runs it when
# it makes a new data directory. SECRETS_DIRECTORY: where the files are.
set -eu

directory=${SECRETS_DIRECTORY:-/run/secrets}
PGUSER=${PGUSER:-postgres}
export PGUSER

for name in dagster mlflow; do
    ROLE_PASSWORD=$(cat -- "$directory/${name}_password")
    if [ -z "$ROLE_PASSWORD" ]; then
        printf 'create_databases: %s is empty\n' "$directory/${name}_password" >&2
        exit 1
    fi
    export ROLE_PASSWORD
    # The password reaches psql by the environment and is in no log of the server.
    psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --set name="$name" --dbname postgres <<'SQL'
\getenv password ROLE_PASSWORD
SET log_statement = 'none';
SET log_min_duration_statement = -1;
SET log_min_error_statement = 'panic';
SET password_encryption = 'scram-sha-256';
SELECT format('CREATE ROLE %I LOGIN', :'name')
    WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = :'name') \gexec
ALTER ROLE :"name" PASSWORD :'password';
SELECT format('CREATE DATABASE %I OWNER %I', :'name', :'name')
    WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = :'name') \gexec
REVOKE ALL ON DATABASE :"name" FROM PUBLIC;
SQL
done
