#!/usr/bin/env bash
# Runs mlflow_server.sh to its end in a fresh Debian: make test-mlflow-server. Needs root on a Debian-like system,
# Debian's packages and PyPI; takes four minutes of a processor. It leaves debootstrap installed, and nothing else.
#
# systemd cannot run in a chroot. A stand-in for systemctl starts the unit's command as a user without rights, with the
# unit's variables, and ends it again.
#
# DEBIAN_MIRROR: where debootstrap gets packages, if not from its default.
# PIP_INDEX_URL: package index in place of PyPI.
set -euo pipefail
cd "$(dirname "$0")/.."

release=bookworm
# A version whose tables the pinned one upgrades, and which suits the other pins.
old_mlflow=3.16.1

say() { printf 'test-mlflow-server: %s\n' "$*" >&2; }

fail() {
    say "$*"
    exit 1
}

# Outside of the chroot

clean_up() {
    rm -rf --one-file-system "$work"
}

install_debootstrap() {
    command -v debootstrap >/dev/null && return
    command -v apt-get >/dev/null || fail "install debootstrap"
    say "installing debootstrap with apt-get"
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends debootstrap; } \
        >"$work/apt.log" 2>&1 </dev/null || fail "debootstrap cannot be installed: $(tail -n 1 "$work/apt.log")"
}

make_root() {
    say "making a Debian ($release)"
    debootstrap --variant=minbase --include=ca-certificates,postgresql,python3 \
        "$release" "$root" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} >"$work/debootstrap.log" 2>&1 ||
        fail "debootstrap cannot make $release: $(tail -n 1 "$work/debootstrap.log")"
    # The authorities that this machine trusts.
    cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
    echo "127.0.0.1 localhost" >"$root/etc/hosts"
    mkdir -p "$root/clone/deploy"
    cp constraints.txt "$root/clone/"
    cp deploy/*.sh deploy/*.py "$root/clone/deploy/"
}

run_inside() {
    # Its processes and mounts end with it, however it ends.
    env --ignore-environment HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
        ${PIP_INDEX_URL:+PIP_INDEX_URL="$PIP_INDEX_URL"} \
        unshare --mount --pid --fork --kill-child --root="$root" --wd=/ --mount-proc \
        /clone/deploy/test_mlflow_server.sh inside
}

# Inside

free_port() {
    python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# `start` of what runs does nothing, like that of systemd.
install_systemctl() {
    useradd --system --no-create-home --shell /usr/sbin/nologin mlflow
    mkdir -p /run/systemd/system
    cat >/usr/local/bin/systemctl <<'SYSTEMCTL'
#!/bin/bash
set -eu
unit=/etc/systemd/system/mlflow.service
runs() { [ -f /run/mlflow.pid ] && kill -0 -- "-$(cat /run/mlflow.pid)" 2>/dev/null; }
value() { sed -n "s/^$1=//p" "$unit"; }
echo "$*" >>/run/systemctl
case "$1 ${*: -1}" in
"start mlflow.service")
    ! runs || exit 0
    install -d -o mlflow -g mlflow -m "$(value StateDirectoryMode)" "/var/lib/$(value StateDirectory)"
    cd "/var/lib/$(value StateDirectory)"
    # shellcheck disable=SC2016 # expanded by the inner shell
    env -i PATH="$PATH" HOME=/ setsid bash -c 'set -a; . "$1"; set +a
        eval "exec setpriv --reuid=mlflow --regid=mlflow --clear-groups --no-new-privs $2"' \
        bash "$(value EnvironmentFile)" "$(value ExecStart)" >>/var/log/mlflow.log 2>&1 </dev/null &
    echo $! >/run/mlflow.pid
    ;;
"stop mlflow.service")
    ! runs || kill -TERM -- "-$(cat /run/mlflow.pid)"
    while runs; do sleep 0.2; done
    ;;
"daemon-reload daemon-reload" | "enable mlflow.service") ;;
*) echo "what is: systemctl $*" >&2 && exit 1 ;;
esac
SYSTEMCTL
    chmod 755 /usr/local/bin/systemctl
}

# Debian's PostgreSQL, with the databases as deploy/ makes them.
start_postgres() {
    local name
    mount -t tmpfs tmpfs /dev/shm
    postgres_port=$(free_port)
    sed -i "s/^port = .*/port = $postgres_port/" /etc/postgresql/*/main/postgresql.conf
    mkdir /secrets
    for name in dagster mlflow; do
        head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n' >"/secrets/${name}_password"
    done
    chown -R postgres /secrets
    pg_ctlcluster "$(ls /etc/postgresql)" main start
    as_postgres env SECRETS_DIRECTORY=/secrets /clone/deploy/create_databases.sh
}

as_postgres() { setpriv --reuid=postgres --regid=postgres --init-groups env PGPORT="$postgres_port" "$@"; }

sql() { as_postgres psql --no-psqlrc --quiet --tuples-only --no-align --set ON_ERROR_STOP=1 mlflow --command "$1"; }

# Runs mlflow_server.sh with the variables $2…; it must end with status $1. Its output is in /run/output.
install_server() {
    local expected=$1 status=0
    shift
    : >/run/systemctl
    # An administrator's umask may keep files from others, whose number the server's user is of.
    (umask 077 && env "$@" /clone/deploy/mlflow_server.sh) >/run/output 2>&1 || status=$?
    [ "$status" = "$expected" ] || {
        tail -n 20 /run/output /var/log/mlflow.log >&2
        fail "mlflow_server.sh exited with $status, not $expected"
    }
}

said() {
    grep -qF -- "$1" /run/output || {
        tail -n 20 /run/output >&2
        fail "mlflow_server.sh did not say: $1"
    }
}

# Checks that the server of version $1 answers and still has what was stored.
answers() {
    python3 - "$mlflow_port" "$1" <<'PYTHON' || fail "MLflow $1 does not answer as it should; see above"
import sys
import time
import urllib.request

port, version = sys.argv[1:]


def get(path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=60) as response:
        return response.read().decode()


for _ in range(120):  # one that starts again is given time
    try:
        get("health")
        break
    except OSError:
        time.sleep(1)
assert get("version") == version, get("version")
assert '"kept"' in get("api/2.0/mlflow/experiments/get-by-name?experiment_name=kept")
assert get("api/2.0/mlflow-artifacts/artifacts/probe.txt") == "stored"
PYTHON
}

store() {
    python3 - "$mlflow_port" <<'PYTHON'
import sys
import urllib.request

base = f"http://127.0.0.1:{sys.argv[1]}/api/2.0"
for method, path, body, kind in (
    ("POST", "mlflow/experiments/create", b'{"name": "kept"}', "application/json"),
    ("PUT", "mlflow-artifacts/artifacts/probe.txt", b"stored", "text/plain"),
):
    request = urllib.request.Request(f"{base}/{path}", body, {"Content-Type": kind}, method=method)
    urllib.request.urlopen(request, timeout=60).close()
PYTHON
}

# What a failed upgrade must leave alone.
state() {
    sha256sum /etc/mlflow/server.env /etc/systemd/system/mlflow.service
    readlink /opt/mlflow/venv
    sql "SELECT version_num FROM alembic_version"
}

check_inside() {
    local before pid new_mlflow
    new_mlflow=$(sed -n 's/^mlflow==//p' /clone/constraints.txt)
    mlflow_port=$(free_port)
    settings=(MLFLOW_BACKEND_STORE_URI="postgresql+psycopg2://mlflow@127.0.0.1:$postgres_port/mlflow"
        PGPASSWORD_FILE=/secrets/mlflow_password MLFLOW_ARTIFACTS_DESTINATION=/var/lib/mlflow/artifacts
        MLFLOW_PORT="$mlflow_port")

    install_server 1 "${settings[@]}"
    said "apt-get install python3-venv"
    [ ! -e /etc/mlflow ] && [ ! -e /opt/mlflow ] || fail "something was installed without python3-venv"
    { apt-get update && apt-get install --yes --no-install-recommends python3-venv; } >/run/apt.log 2>&1 </dev/null ||
        fail "python3-venv cannot be installed: $(tail -n 1 /run/apt.log)"
    say "without venv: the package is named"

    cp /clone/constraints.txt /new.txt
    sed -E "s/^(mlflow|mlflow-skinny|mlflow-tracing)==.*/\1==$old_mlflow/" /new.txt >/clone/constraints.txt
    install_server 0 "${settings[@]}"
    store
    answers "$old_mlflow"
    say "fresh installation: MLflow $old_mlflow answers"

    # From here on without settings: they are kept.
    cp /new.txt /clone/constraints.txt
    before=$(state) pid=$(cat /run/mlflow.pid)
    install_server 1 PYTHON=/nowhere/python3
    said "/nowhere/python3 is not a Python"
    install_server 1 PIP_INDEX_URL=http://127.0.0.1:9 PIP_RETRIES=0
    said "the packages cannot be installed"
    [ ! -s /run/systemctl ] && [ "$pid" = "$(cat /run/mlflow.pid)" ] || fail "the server was touched"
    [ "$before" = "$(state)" ] || fail "something was changed"
    answers "$old_mlflow"
    say "upgrade without a Python, then without packages: MLflow $old_mlflow runs on"

    # The database takes the connection and refuses the first change of a table.
    sql "CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS
        'BEGIN RAISE EXCEPTION ''no changes of tables today''; END'"
    sql "CREATE EVENT TRIGGER refuse ON ddl_command_start EXECUTE FUNCTION refuse()"
    install_server 1
    said "no changes of tables today"
    said "the installed server starts again"
    [ "$before" = "$(state)" ] || fail "something was changed"
    answers "$old_mlflow"
    sql "DROP EVENT TRIGGER refuse"
    say "upgrade whose tables are refused: MLflow $old_mlflow answers again"

    install_server 0
    answers "$new_mlflow"
    [ "$(find /opt/mlflow -maxdepth 1 -name 'venv-*' | wc -l)" = 1 ] || fail "the old environment is still there"
    [ "${before##*$'\n'}" != "$(state | tail -n 1)" ] ||
        fail "the tables were not upgraded: take an older version than $old_mlflow"
    say "upgrade: MLflow $new_mlflow answers, and has what was stored"
}

if [ "${1:-}" = inside ]; then
    install_systemctl
    start_postgres
    check_inside
    exit
fi
[ "$(id -u)" = 0 ] || fail "run it as root: sudo make test-mlflow-server"
work=$(mktemp -d)
root=$work/root
trap clean_up EXIT
trap 'exit 1' HUP INT TERM
install_debootstrap
make_root
run_inside
say "all passed"
