#!/bin/sh
# Prints the path of Docker Compose 2, which checks deploy/compose.yaml without an engine: the installed one, else one that
# Go builds from its source once (some minutes) and keeps outside the clone. Exits with 1 where there is neither.
set -eu

version=v2.40.3
program=${XDG_CACHE_HOME:-$HOME/.cache}/ml_platform/docker-compose-$version/docker-compose

say() { printf 'docker_compose: %s\n' "$*" >&2; }

is_version_2() { case $("$1" version --short 2>/dev/null) in 2.* | v2.*) ;; *) return 1 ;; esac; }

build() {
    directory=$(dirname "$program")
    mkdir -p "$directory"
    draft=$(mktemp -d "$directory/XXXXXX")
    say "building Docker Compose $version once (some minutes)"
    # Not `go install`, which refuses the replacements in the module's go.mod.
    (
        cd "$draft"
        go mod init compose
        go get "github.com/docker/compose/v2/cmd@$version"
        go build -ldflags "-s -w -X github.com/docker/compose/v2/internal.Version=$version" -o docker-compose \
            github.com/docker/compose/v2/cmd
    ) >"$directory/build.log" 2>&1 </dev/null || {
        say "the build failed: $(tail -n 1 "$directory/build.log")"
        rm -rf "$draft"
        return 1
    }
    mv "$draft/docker-compose" "$program"
    rm -rf "$draft"
}

for installed in docker-compose /usr/libexec/docker/cli-plugins/docker-compose \
    /usr/lib/docker/cli-plugins/docker-compose "$HOME/.docker/cli-plugins/docker-compose"; do
    if command -v "$installed" >/dev/null 2>&1 && is_version_2 "$installed"; then
        command -v "$installed"
        exit
    fi
done
if [ ! -x "$program" ]; then
    command -v go >/dev/null 2>&1 || {
        say "neither Docker Compose 2 nor Go is installed"
        exit 1
    }
    build
fi
printf '%s\n' "$program"
