#!/usr/bin/env bash
# A machine loses its power in the middle of a training: `bash launch/demo.sh [root] [OVERRIDES]`. See README.md.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"
# The lab is known to be impossible before anything is installed. It is the tests' lab, and needs no package of Python.
"$(find_python)" -c 'import sys; from tests.lab.lab import missing; sys.exit(missing())' ||
    die "this demo builds several hosts on one machine; without them type: bash launch/quickstart.sh"
setup ""
exec python launch/demo.py "$@"
