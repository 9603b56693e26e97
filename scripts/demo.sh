#!/usr/bin/env bash
# Install and run the whole job on drawn scenes. Downloads nothing but packages.
# Arguments go to `cap demo`.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/install.sh
install ""
exec .venv/bin/cap demo "$@"
