#!/usr/bin/env bash
# Lint, types and all tests on a fresh machine: `bash launch/test.sh [pytest arguments]`.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"
setup "[dev]"

# The cluster tests need a few Debian packages; without them or without root they are skipped, and say so.
needed=(openssh-server pdsh iproute2 sshfs)
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    missing=()
    for package in "${needed[@]}"; do
        dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
    done
    if [ ${#missing[@]} -gt 0 ]; then
        echo "installing ${missing[*]} for the cluster tests"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}"; } >/dev/null 2>&1 ||
            echo "warning: could not install ${missing[*]}; the cluster tests will be skipped"
    fi
fi

ruff check .
ruff format --check .
mypy
if [ -z "${GEMINI_GNN_DATA:-}" ] && [ -d "$ROOT/../shared/data" ]; then
    GEMINI_GNN_DATA="$(cd "$ROOT/../shared/data" && pwd)"
    export GEMINI_GNN_DATA
fi
python -m pytest --cov --cov-report=term:skip-covered --cov-fail-under=70 "$@"
