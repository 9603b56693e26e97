#!/usr/bin/env bash
# Install into .venv, then run the whole job on drawn scenes. Downloads nothing but packages.
#
#   scripts/demo.sh [ARGUMENTS OF `cap demo`]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/install.sh
install ""
exec .venv/bin/cap demo "$@"
