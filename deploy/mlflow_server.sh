#!/usr/bin/env bash
# Installs MLflow's server on a plain virtual machine with systemd, or brings an installed one to this clone's version:
# its own virtual environment, its tables in the database, a service that starts with the machine. Run as root; may be
# run again at any time. Settings that are not given again stay as they are.
#
# An installed server runs on while the packages of the new one are fetched. It is started again, with its settings of
# before, if the database refuses the new settings or an upgrade of its tables, or if the new server does not answer.
# MLflow refuses tables of a newer version, so back up the database before an upgrade: the way back may need it.
#
# Variables, kept in /etc/mlflow/server.env, which only root can read:
#   MLFLOW_BACKEND_STORE_URI       needed at first: postgresql+psycopg2://mlflow@host:5432/mlflow
#   PGPASSWORD                     password of that database; or PGPASSWORD_FILE, a file that holds it
#   PGSSLMODE, PGSSLROOTCERT       as libpq reads them: verify-full and the authority's certificate
#   MLFLOW_ARTIFACTS_DESTINATION   needed at first: s3://bucket/prefix or a directory below /var/lib/mlflow
#   AWS_ENDPOINT_URL_S3, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION   for s3://
#   MLFLOW_PORT                    default 5000; the server listens on 127.0.0.1 only
#   MLFLOW_SERVER_ALLOWED_HOSTS    default localhost:*,127.0.0.1:*; behind a proxy: its name, too
# PYTHON: interpreter, 3.11 to 3.14; default python3.
# DESTDIR: write the files below that directory, install and start nothing.
set -euo pipefail
# The server's user, who is not root, reads what is installed.
umask 022

clone=$(cd "$(dirname "$0")/.." && pwd)
root=${DESTDIR:-}
python=${PYTHON:-python3}
home=/opt/mlflow
settings=$root/etc/mlflow/server.env
unit=$root/etc/systemd/system/mlflow.service
kept=(MLFLOW_BACKEND_STORE_URI PGPASSWORD PGSSLMODE PGSSLROOTCERT MLFLOW_ARTIFACTS_DESTINATION AWS_ENDPOINT_URL_S3
    AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_DEFAULT_REGION MLFLOW_PORT MLFLOW_SERVER_ALLOWED_HOSTS)

say() { printf 'mlflow_server: %s\n' "$*" >&2; }

fail() {
    say "$*"
    exit 1
}

# Fills in what the environment leaves open from an earlier run's settings.
load_settings() {
    local name
    local -A given=()
    for name in "${kept[@]}"; do
        [ -z "${!name:-}" ] || given[$name]=${!name}
    done
    if [ -n "${PGPASSWORD_FILE:-}" ]; then
        [ -z "${PGPASSWORD:-}" ] || fail "set PGPASSWORD or PGPASSWORD_FILE, not both"
        given[PGPASSWORD]=$(cat -- "$PGPASSWORD_FILE") || fail "PGPASSWORD_FILE: that file cannot be read"
    fi
    # shellcheck source=/dev/null # written by this script
    [ ! -f "$settings" ] || . "$settings"
    for name in "${!given[@]}"; do
        printf -v "$name" %s "${given[$name]}"
    done
    MLFLOW_PORT=${MLFLOW_PORT:-5000}
    MLFLOW_SERVER_ALLOWED_HOSTS=${MLFLOW_SERVER_ALLOWED_HOSTS:-localhost:*,127.0.0.1:*}
}

check_settings() {
    local name
    case ${MLFLOW_BACKEND_STORE_URI:-} in
    postgresql+psycopg2://?*) ;;
    "") fail "no database: set MLFLOW_BACKEND_STORE_URI, e.g. postgresql+psycopg2://mlflow@host:5432/mlflow" ;;
    *) fail "MLFLOW_BACKEND_STORE_URI takes postgresql+psycopg2://user@host:5432/database" ;;
    esac
    case ${MLFLOW_ARTIFACTS_DESTINATION:-} in
    s3://?* | /var/lib/mlflow/?*) ;;
    *) fail "set MLFLOW_ARTIFACTS_DESTINATION to s3://bucket/prefix or a directory below /var/lib/mlflow" ;;
    esac
    if ! [[ $MLFLOW_PORT =~ ^[1-9][0-9]{0,4}$ ]] || ((MLFLOW_PORT > 65535)); then
        fail "MLFLOW_PORT takes a port, e.g. 5000"
    fi
    for name in "${kept[@]}"; do
        [[ ${!name:-} != *$'\n'* ]] || fail "$name takes one line"
    done
}

# Puts standard input into file $2 with mode $1, at once and only if it differs.
install_file() {
    local new
    install -d "$(dirname "$2")"
    new=$(mktemp "$2.XXXXXX")
    cat >"$new"
    chmod "$1" "$new"
    if cmp -s "$new" "$2"; then
        rm "$new"
        chmod "$1" "$2"
    else
        mv "$new" "$2"
        say "wrote $2"
    fi
}

# One value in quotation marks, so that systemd and the shell read it alike.
quoted() {
    local value=$1
    value=${value//\\/\\\\}
    value=${value//\"/\\\"}
    value=${value//\$/\\\$}
    value=${value//\`/\\\`}
    printf '"%s"\n' "$value"
}

print_settings() {
    local name
    for name in "${kept[@]}"; do
        [ -z "${!name:-}" ] || printf '%s=%s' "$name" "$(quoted "${!name}")"$'\n'
    done
    printf '%s\n' MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true
}

write_unit() {
    install_file 644 "$unit" <<UNIT
[Unit]
Description=MLflow tracking server
After=network-online.target postgresql.service
Wants=network-online.target
StartLimitIntervalSec=0

[Service]
DynamicUser=yes
StateDirectory=mlflow
StateDirectoryMode=0700
WorkingDirectory=%S/mlflow
EnvironmentFile=/etc/mlflow/server.env
ExecStart=$home/venv/bin/mlflow server --host 127.0.0.1 --port \${MLFLOW_PORT} --workers 2 --uvicorn-opts=--timeout-worker-healthcheck=120
Restart=always
RestartSec=5
MemoryMax=3G
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6

[Install]
WantedBy=multi-user.target
UNIT
}

check_python() {
    "$python" -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null ||
        fail "$python is not a Python 3.11 to 3.14 with venv: apt-get install python3-venv, or set PYTHON"
}

# Makes an environment of its own for each Python and set of versions, so that the server can run on in another.
install_packages() {
    environment=$home/venv-$({ "$python" --version && cat "$clone/constraints.txt"; } | cksum | cut -d ' ' -f 1)
    [ ! -f "$environment/complete" ] || return 0
    say "installing packages in $environment"
    rm -rf "$environment"
    install -d "$home"
    "$python" -m venv "$environment"
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check -c "$clone/constraints.txt" \
        boto3 mlflow psycopg2-binary || fail "the packages cannot be installed; nothing was changed"
    touch "$environment/complete"
}

prepare_database() (
    set -a
    eval "$(print_settings)"
    exec "$environment/bin/python" "$clone/deploy/mlflow_database.py"
)

# Makes $home/venv lead to environment $1.
switch_environment() {
    [ -L "$home/venv" ] || rm -rf "$home/venv" # of an earlier version of this script
    ln -sfn "$1" "$home/venv"
}

delete_other_environments() {
    find "$home" -maxdepth 1 -name 'venv-*' ! -path "$environment" -exec rm -rf {} +
}

# Keeps what the running server has, to go back to.
save_installed() {
    saved=$(mktemp -d) # root's alone
    cp "$settings" "$saved/settings"
    cp "$unit" "$saved/unit"
    installed=$(readlink "$home/venv" || :)
}

# Starts the server of before. Its upgraded tables, if any, stay, and it may refuse them.
go_back() {
    trap - EXIT
    say "the installed server starts again, with its settings of before"
    systemctl stop mlflow.service || :
    [ -z "$installed" ] || switch_environment "$installed"
    install_file 600 "$settings" <"$saved/settings"
    install_file 644 "$unit" <"$saved/unit"
    rm -rf "$saved"
    systemctl daemon-reload
    systemctl start mlflow.service
    # shellcheck source=/dev/null # written by this script
    . "$settings"
    becomes_healthy ||
        say "MLflow does not answer (journalctl -u mlflow): if its tables were upgraded, restore the database's backup"
}

# Waits two minutes for an answer of the server.
becomes_healthy() {
    local i
    for ((i = 0; i < 60; i++)); do
        if "$python" -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5)' \
            "http://127.0.0.1:$MLFLOW_PORT/health" 2>/dev/null; then
            say "MLflow answers on http://127.0.0.1:$MLFLOW_PORT"
            return
        fi
        sleep 2
    done
    return 1
}

load_settings
check_settings
if [ -n "$root" ]; then
    print_settings | install_file 600 "$settings"
    write_unit
    exit
fi
[ "$(id -u)" = 0 ] || fail "run it as root: sudo --preserve-env $0"
[ -d /run/systemd/system ] || fail "systemd does not run here"
check_python
install_packages
# The tables are changed while nobody uses them.
saved=
# Also if it is not active at this moment: a server that fails is started again and again.
if [ -f "$unit" ]; then
    save_installed
    trap go_back EXIT
    systemctl stop mlflow.service
fi
prepare_database
switch_environment "$environment"
print_settings | install_file 600 "$settings"
write_unit
systemctl daemon-reload
systemctl enable --quiet mlflow.service
systemctl start mlflow.service
becomes_healthy || fail "MLflow does not answer: journalctl -u mlflow"
trap - EXIT
delete_other_environments
[ -z "$saved" ] || rm -rf "$saved"
