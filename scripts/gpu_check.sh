#!/usr/bin/env bash
# On a machine with a GPU: check that everything works there, then measure how fast it is.
#
#   scripts/gpu_check.sh [checks|speeds] [OPTIONS]
#
# Each half takes at most three minutes; without an argument both run. The speeds take 14 GB of disk
# in the folder for temporary files (TMPDIR), and as much memory for the files to stay in. No network
# is needed where torch is installed. Prints the path of the JSON file with the results.
# Options go to gpu_check.py: --out FILE, --only train, --only STEP, --device, --backbone, --photos.
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
