#!/bin/sh
# Starts a command with the password of its database in PGPASSWORD, which every PostgreSQL client reads. It is taken
# from the file that PGPASSWORD_FILE names, if any, so that it never appears in a URL.
# The option --log-format=text becomes what Dagster calls text.
set -eu

fail() {
    printf 'entrypoint: %s\n' "$*" >&2
    exit 1
}

if [ $# = 0 ]; then
    fail "which command is to be started? E.g. entrypoint.sh dagster-daemon run"
fi
if [ -n "${PGPASSWORD_FILE:-}" ]; then
    [ -z "${PGPASSWORD:-}" ] || fail "set PGPASSWORD or PGPASSWORD_FILE, not both"
    PGPASSWORD=$(cat -- "$PGPASSWORD_FILE") || fail "PGPASSWORD_FILE: make that file readable for user $(id -u)"
    [ -n "$PGPASSWORD" ] || fail "PGPASSWORD_FILE: $PGPASSWORD_FILE is empty"
    export PGPASSWORD
    unset PGPASSWORD_FILE
fi
for word; do
    shift
    [ "$word" != --log-format=text ] || word=--log-format=colored
    set -- "$@" "$word"
done
exec "$@"
