#!/usr/bin/env bash
# Lint, types and all tests on a fresh machine: `bash launch/test.sh [pytest arguments]`.
# `bash launch/test.sh --long [--seed N] [--kills N] [pytest arguments]`: only the campaigns of kills in tests/chaos.
# `bash launch/test.sh --coverage [pytest arguments]`: all tests, and which lines they run. Tracing takes as long again.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"
setup "[dev]"

if [ "${1:-}" = --long ]; then
    exec python -m pytest -n 0 -m long -s -o timeout=7200 "${@:2}" # -s: a line per kill, and the seed
fi

# The cluster tests need a few Debian packages; without them or without root they are skipped, and say so.
install() { # for what, packages
    local what=$1 package missing=()
    shift
    for package in "$@"; do
        dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    echo "installing ${missing[*]} for $what"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}"; } >/dev/null 2>&1 ||
        echo "warning: could not install ${missing[*]}; $what will be skipped"
}
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    install "the cluster tests" openssh-server pdsh iproute2 sshfs
    command -v srun >/dev/null || install "the test of SLURM" slurmctld slurmd slurm-client munge # never beside another SLURM
fi

ruff check .
ruff format --check .
mypy
if [ -z "${GEMINI_GNN_DATA:-}" ] && [ -d "$ROOT/../shared/data" ]; then
    GEMINI_GNN_DATA="$(cd "$ROOT/../shared/data" && pwd)"
    export GEMINI_GNN_DATA
fi
traced=()
if [ "${1:-}" = --coverage ]; then
    traced=(--cov --cov-report=term:skip-covered --cov-fail-under=70)
    shift
fi
# Two at a time: most of the time is waiting for processes to start and to die. `-n 0`: one after the other, with a debugger.
python -m pytest -n 2 --dist worksteal "${traced[@]}" "$@"
