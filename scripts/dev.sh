#!/usr/bin/env bash
# Runs Dagster's UI and daemon with MLflow's UI beside them until Ctrl-C, then stops all of it.
# PORT and MLFLOW_PORT choose the ports. Called by `make dev`, which sets DAGSTER_HOME and JAVA_HOME.
# shellcheck disable=SC2317 # `stop` and what it calls are run by a trap
set -euo pipefail
cd "$(dirname "$0")/.."

port=${PORT:-3000}
mlflow_port=${MLFLOW_PORT:-5000}
# Dagster itself gives its services 60 s to stop.
grace_seconds=70
groups=()

say() { printf 'dev: %s\n' "$*" >&2; }

port_is_free() {
    .venv/bin/python - "$1" <<'PY'
import socket, sys
with socket.socket() as s:
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        s.bind(("127.0.0.1", int(sys.argv[1])))
    except OSError:
        sys.exit(1)
PY
}

require_free_port() {
    if ! port_is_free "$2"; then
        say "port $2 is in use: choose another one, e.g. make dev $1=$(($2 + 1))"
        exit 1
    fi
}

# Starts a command in a process group of its own: what it leaves behind can be found and stopped.
start() {
    set -m
    "$@" </dev/null &
    set +m
    groups+=("$!")
}

any_group_alive() {
    local group
    for group in "${groups[@]}"; do
        if kill -0 -- "-$group" 2>/dev/null; then
            return 0
        fi
    done
    return 1
}

signal_groups() {
    local group
    for group in "${groups[@]}"; do
        kill "-$1" -- "-$group" 2>/dev/null || true
    done
}

stop() {
    trap - EXIT
    trap '' INT TERM HUP
    if any_group_alive; then
        say "stopping"
        # What a terminal's Ctrl-C does: every process of the group is interrupted, runs in progress too.
        signal_groups INT
        local deadline=$((SECONDS + grace_seconds))
        while any_group_alive && ((SECONDS < deadline)); do
            sleep 0.2
        done
        signal_groups KILL
    fi
    wait 2>/dev/null || true
}

trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

require_free_port PORT "$port"
tracking_uri=${MLFLOW_TRACKING_URI:-}
if [[ -z $tracking_uri && -f .env ]]; then
    tracking_uri=$(.venv/bin/dotenv -f .env get MLFLOW_TRACKING_URI 2>/dev/null) || tracking_uri=""
fi
if [[ $tracking_uri == http://* || $tracking_uri == https://* ]]; then
    say "MLflow  $tracking_uri"
else
    require_free_port MLFLOW_PORT "$mlflow_port"
    mkdir -p data
    start env -u MLFLOW_TRACKING_URI MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
        .venv/bin/mlflow ui --host 127.0.0.1 --port "$mlflow_port" --workers 1 \
        --backend-store-uri "${tracking_uri:-sqlite:///data/mlflow.db}"
    say "MLflow  http://127.0.0.1:$mlflow_port"
fi
say "Dagster http://127.0.0.1:$port (Ctrl-C stops both)"
start .venv/bin/dagster dev -w workspace.yaml -h 127.0.0.1 -p "$port"
status=0
wait -n || status=$?
say "a service ended with status $status"
exit "$status"
