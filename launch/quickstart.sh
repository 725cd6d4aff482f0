#!/usr/bin/env bash
# From nothing to a trained model: `bash launch/quickstart.sh [OVERRIDES]`. See README.md.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"
setup ""
exec python launch/quickstart.py "$@"
