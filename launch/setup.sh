# Sourced by quickstart.sh and test.sh: an environment with the project in it. Uses an active virtual environment, else
# makes .venv; installs from pinned versions when pyproject.toml or constraints.txt changed since the last time.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

die() { echo "error: $*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3; do
        if command -v "$candidate" >/dev/null && "$candidate" -c \
            'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"; return
        fi
    done
    die "Python 3.11 or 3.12 not found; on Debian or Ubuntu: apt-get install python3 python3-venv"
}

pinned() { # pinned WHAT ARGUMENTS-OF-PIP...
    echo "  $1"
    "$VIRTUAL_ENV/bin/python" -m pip install --quiet --progress-bar off -c "$ROOT/constraints.txt" "${@:2}"
}

setup() { # setup EXTRAS, e.g. "" or "[dev]"
    local extras="$1" environment stamp wanted
    if [ -n "${VIRTUAL_ENV:-}" ]; then
        environment="$VIRTUAL_ENV"
    else
        environment="$ROOT/.venv"
        if [ ! -x "$environment/bin/python" ]; then
            echo "making $environment"
            "$(find_python)" -m venv "$environment" || die "could not make $environment; on Debian or Ubuntu: apt-get install python3-venv"
        fi
        export VIRTUAL_ENV="$environment" PATH="$environment/bin:$PATH"
    fi
    stamp="$environment/gemini_gnn.installed"
    wanted="$extras $(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | sha256sum) $ROOT"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] || [ "$(cat "$stamp" 2>/dev/null)" = "[dev]${wanted#"$extras"}" ]; then
        return
    fi
    echo "installing pinned versions (a few minutes the first time):"
    pinned "build tools" setuptools wheel
    # DeepSpeed looks for torch while it is built: torch first, then everything else without build isolation.
    pinned "PyTorch (0.2 GB; 3 GB where it comes with CUDA)" torch numpy
    DS_BUILD_OPS=0 pinned "DeepSpeed, PyG, numba, ..." --no-build-isolation -e "$ROOT$extras"
    echo "$wanted" > "$stamp"
}
