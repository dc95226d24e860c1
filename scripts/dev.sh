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
signals=()

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

# Starts a command as the leader of a session and process group of its own, so that what it leaves behind can be
# found and stopped, and with SIGINT undone where it is ignored (as in jobs that a script starts). The first
# argument is the signal that ends the command properly.
start() {
    signals+=("$1")
    shift
    .venv/bin/python -c '
import os, signal, sys
os.setsid()
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])' "$@" </dev/null &
    groups+=("$!")
}

signal_group() { kill "-$1" -- "-$2" 2>/dev/null; }

any_group_alive() {
    local group
    for group in "${groups[@]}"; do
        if signal_group 0 "$group"; then
            return 0
        fi
    done
    return 1
}

stop() {
    trap - EXIT
    trap '' INT TERM HUP
    if any_group_alive; then
        say "stopping"
        local i
        # As Ctrl-C in a terminal does: the whole group gets the signal, runs in progress too.
        for i in "${!groups[@]}"; do
            signal_group "${signals[i]}" "${groups[i]}" || true
        done
        local deadline=$((SECONDS + grace_seconds))
        while any_group_alive && ((SECONDS < deadline)); do
            sleep 0.2
        done
        for i in "${!groups[@]}"; do
            signal_group KILL "${groups[i]}" || true
        done
    fi
    wait 2>/dev/null || true
}

trap stop EXIT
trap 'exit 0' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

require_free_port PORT "$port"
# Dagster reads .env over the environment, too.
tracking_uri=$(.venv/bin/python - <<'PY'
import sys
from pathlib import Path

from dotenv import load_dotenv

from ml_platform.settings import SettingsError, load_settings

load_dotenv(".env", override=True)
try:
    settings = load_settings()
except SettingsError as error:
    sys.exit(f"dev: {error}")
if not settings.mlflow_tracking_uri:
    settings.default_mlflow_directory.mkdir(parents=True, exist_ok=True)
print(settings.tracking_uri)
PY
)
if [[ $tracking_uri == http://* || $tracking_uri == https://* ]]; then
    say "MLflow  $tracking_uri"
else
    require_free_port MLFLOW_PORT "$mlflow_port"
    # In the environment, because everybody can read a command line, and the address may contain a password.
    MLFLOW_BACKEND_STORE_URI=$tracking_uri MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false start TERM \
        env -u MLFLOW_TRACKING_URI .venv/bin/mlflow ui --host 127.0.0.1 --port "$mlflow_port" --workers 1 \
        --uvicorn-opts '--log-level error'
    say "MLflow  http://127.0.0.1:$mlflow_port"
fi
say "Dagster http://127.0.0.1:$port (Ctrl-C stops both)"
# `dagster dev`, but for a webserver that does not obey the pages of other sites.
start INT .venv/bin/python -c 'from ml_platform.operations.webserver import dev; dev()' \
    -w workspace.yaml -h 127.0.0.1 -p "$port"
status=0
wait -n || status=$?
say "a service ended with status $status"
exit "$status"
