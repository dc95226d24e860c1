#!/bin/sh
# Sees to it that there is a browser for `make test-ui`: root on Debian gets Chromium, all others are told what to install.
set -eu

say() { printf 'chromium: %s\n' "$*" >&2; }

# The same names as in ml_platform_tests/ui/conftest.py.
for browser in chromium google-chrome google-chrome-stable; do
    command -v "$browser" >/dev/null 2>&1 && exit
done
# Ubuntu's package of this name is none: it installs a snap.
if [ "$(id -u)" = 0 ] && grep -qs '^ID=debian' /etc/os-release; then
    say "installing chromium with apt-get"
    log=$(mktemp)
    export DEBIAN_FRONTEND=noninteractive
    if { apt-get update && apt-get install --yes --no-install-recommends chromium; } >"$log" 2>&1 </dev/null; then
        rm -f "$log"
        exit
    fi
    tail -n 5 "$log" >&2
    rm -f "$log"
fi
say "no browser found: install Chromium (Debian: sudo apt-get install chromium) or Google Chrome"
exit 1
