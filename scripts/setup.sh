#!/bin/sh
# Makes .venv what pyproject.toml, setup.cfg and constraints.txt say; does nothing when it already is.
# PYTHON names the interpreter to use; USE_UV=0 installs with pip alone.
set -eu
cd "$(dirname "$0")/.."

stamp=.venv/ml-platform-installed
python=.venv/bin/python

say() { printf 'setup: %s\n' "$*" >&2; }

# Prints the version of the interpreter $1 when the project supports it and it can create virtual environments.
supported_version() {
    "$1" -c '
import sys
if not (3, 11) <= sys.version_info[:2] < (3, 15):
    sys.exit(1)
import ensurepip, venv
print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        if supported_version "$PYTHON" >/dev/null; then
            command -v "$PYTHON"
            return
        fi
        say "PYTHON=$PYTHON is not a working Python 3.11 to 3.14 with the modules venv and ensurepip"
        return 1
    fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if supported_version "$candidate" >/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    say "no working Python 3.11 to 3.14 with the modules venv and ensurepip found (Debian, Ubuntu:" \
        "sudo apt-get install python3-venv): install one, or name it: make PYTHON=/path/to/python"
    return 1
}

# The directory is part of the state because a virtual environment does not survive being moved or copied.
wanted_state() {
    pwd
    cksum pyproject.toml setup.cfg constraints.txt
}

# Succeeds when .venv works, was made in this directory, and has the Python that was asked for.
environment_usable() {
    "$python" -c 'import pip' >/dev/null 2>&1 && supported_version "$python" >/dev/null || return 1
    if [ -f "$stamp" ] && [ "$(sed -n 1p "$stamp")" != "$(pwd)" ]; then
        return 1
    fi
    if [ -n "${PYTHON:-}" ]; then
        [ "$(supported_version "$PYTHON")" = "$(supported_version "$python")" ]
    fi
}

# pip with the options that all calls share.
pip_install() { "$python" -m pip install --disable-pip-version-check -c constraints.txt "$@"; }

install_with_uv() {
    [ "${USE_UV:-1}" != 0 ] || return 1
    if ! pip_install --quiet uv; then
        say "uv cannot be installed: using pip, which takes longer"
        return 1
    fi
    quiet=""
    [ -t 2 ] || quiet=--quiet
    # PySpark comes as source. pip keeps the wheel that it makes of it; where the index does not say how long its files
    # may be kept, uv downloads and builds it in each new clone, and keeps another 2 GB in its cache.
    pip_install ${quiet:+"$quiet"} --no-build-isolation --no-deps pyspark || return 1
    # uv trusts its own list of authorities unless told to use the system's, as pip does.
    if ! UV_SYSTEM_CERTS=1 .venv/bin/uv pip install ${quiet:+"$quiet"} --python "$python" -c constraints.txt \
        --no-build-isolation -e '.[postgres]' --group dev; then
        say "uv failed: using pip, which takes longer"
        return 1
    fi
}

if environment_usable; then
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(wanted_state)" ]; then
        exit 0
    fi
    rm -f "$stamp"
    say "updating .venv"
else
    interpreter=$(find_python)
    say "creating .venv with Python $(supported_version "$interpreter") ($interpreter)"
    rm -rf .venv
    "$interpreter" -m venv .venv
fi
say "installing packages (2 GB; a few minutes the first time)"
# The build backend first, so that nothing is built with an unpinned one, and a pip that knows dependency groups (25.1).
pip_install --quiet pip setuptools wheel
install_with_uv || pip_install --quiet --no-build-isolation -e '.[postgres]' --group dev
wanted_state >"$stamp"
say "done"
