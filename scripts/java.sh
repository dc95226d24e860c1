#!/bin/sh
# Prints the home of a Java that Spark 4 runs on: JAVA_HOME where it is suitable, else the first suitable one
# among PATH and the usual directories. Where there is none, installs one (root on a Debian-like system only).
# Messages go to standard error.
set -eu

wanted="Java 17 or 21 (full runtime)"

say() { printf 'java: %s\n' "$*" >&2; }

# Prints the home of the Java behind the command $1 when Spark 4 runs on it. Spark starts Java with the module
# named here, which reduced runtimes lack.
home_if_suitable() {
    properties=$("$1" --add-modules=jdk.incubator.vector -XshowSettings:properties -version 2>&1) || return 1
    version=$(printf '%s\n' "$properties" | sed -n 's/^ *java\.specification\.version = //p')
    case $version in 17 | 21) ;; *) return 1 ;; esac
    printf '%s\n' "$properties" | sed -n 's/^ *java\.home = //p'
}

describe() {
    if [ ! -x "$1/bin/java" ]; then
        echo "has no bin/java"
    elif ! first_line=$("$1/bin/java" -version 2>&1 | grep -m 1 version); then
        echo "does not start"
    else
        echo "is $first_line"
    fi
}

search() {
    if [ -n "${JAVA_HOME:-}" ]; then
        home_if_suitable "$JAVA_HOME/bin/java" && return
        found=$(search_elsewhere) || found=""
        say "JAVA_HOME=$JAVA_HOME $(describe "$JAVA_HOME"); Spark needs $wanted${found:+: using $found instead}"
        [ -n "$found" ] && printf '%s\n' "$found"
    else
        search_elsewhere
    fi
}

search_elsewhere() {
    if command -v java >/dev/null 2>&1; then
        home_if_suitable java && return
    fi
    for home in /usr/lib/jvm/* /Library/Java/JavaVirtualMachines/*/Contents/Home /opt/homebrew/opt/openjdk@*; do
        if [ -x "$home/bin/java" ]; then
            home_if_suitable "$home/bin/java" && return
        fi
    done
    return 1
}

install() {
    log=$(mktemp)
    export DEBIAN_FRONTEND=noninteractive
    for package in openjdk-17-jre-headless openjdk-21-jre-headless; do
        say "no $wanted found: installing $package with apt-get"
        if { apt-get update && apt-get install --yes --no-install-recommends "$package"; } \
            >"$log" 2>&1 </dev/null; then
            rm -f "$log"
            return 0
        fi
    done
    tail -n 5 "$log" >&2
    rm -f "$log"
    return 1
}

search && exit
if [ "$(id -u)" = 0 ] && [ -f /etc/debian_version ] && command -v apt-get >/dev/null 2>&1; then
    install && search_elsewhere && exit
fi
say "Spark needs $wanted and none was found: install one (Debian, Ubuntu: sudo apt-get install" \
    "openjdk-17-jre-headless; macOS: brew install openjdk@17), or set JAVA_HOME to one"
exit 1
