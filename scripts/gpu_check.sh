#!/usr/bin/env bash
# On a machine with a GPU: check that everything works there, then measure how fast it is.
# Takes under 8 minutes, needs no network where torch is installed, and prints the path of the JSON
# file with the results.
# Arguments go to gpu_check.py: --out FILE, --checks-only, --only train, --device, --backbone.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
imports='import h5py, numpy, safetensors, torch, typer'
case " $* " in
*" --only train "*) ;;
*) imports="$imports, nltk, PIL, simplejpeg, torchvision" ;;
esac
if ! "$python" -c "$imports" 2>/dev/null; then
    . scripts/install.sh
    install ""
    python=.venv/bin/python
fi
exec "$python" scripts/gpu_check.py "$@"
