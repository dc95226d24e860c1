#!/bin/sh
# Writes constraints.txt: the versions of all direct and indirect dependencies and of the tools that install
# them, for every supported Python. UV_ARGS holds further options of `uv pip compile`.
set -eu
cd "$(dirname "$0")/.."

# An environment that is there stays as it is: it may not fit pyproject.toml before the constraints are renewed.
[ -x .venv/bin/python ] || sh scripts/setup.sh
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv

new=$(mktemp)
trap 'rm -f "$new"' EXIT
cp constraints.txt "$new"
# shellcheck disable=SC2086 # UV_ARGS is a list of options
printf '%s\n' pip setuptools wheel uv |
    UV_SYSTEM_CERTS=1 .venv/bin/uv pip compile --quiet --universal --python-version 3.11 --all-extras \
        --group dev --group benchmark --no-annotate --no-header \
        ${UV_ARGS:-} --output-file "$new" pyproject.toml -
{
    echo '# Every version that the project is tested with, on Python 3.11 to 3.14.'
    # shellcheck disable=SC2016 # the backquotes are quotation marks
    echo '# Written by `make constraints`, which keeps what still fits; `make constraints UV_ARGS=--upgrade`'
    echo '# takes the newest versions of all.'
    cat "$new"
} >constraints.txt
