# Sourced by demo.sh, gpu_check.sh and test.sh, which run in the repository root.

# usage: make_environment FOLDER
# Makes a virtual environment there, unless there is one with pip.
make_environment() {
    local folder=$1 python=${PYTHON:-python3}
    if ! "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
            echo "cap needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2
            exit 1
        }
        "$python" -m venv "$folder" || {
            echo "cannot make $folder (on Debian: apt install python3-venv)" >&2
            exit 1
        }
    fi
}

# usage: pip_install FOLDER CONSTRAINTS EXTRAS
# Installs the project into the environment in FOLDER, in place.
pip_install() {
    echo "installing into $1 (torch is large; this takes a minute or two)" >&2
    "$1/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$2" --editable ".$3"
}

# usage: install EXTRAS ("" or "[dev]")
# Installs the tested versions into .venv, again only after a change of what is to be installed.
install() {
    local stamp=".venv/.installed$1"
    make_environment .venv
    if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
        pip_install .venv constraints.txt "$1"
        touch "$stamp"
    fi
}

# usage: install_lowest
# Installs the lowest versions that pyproject.toml allows into .venv-lowest, and lists them.
install_lowest() {
    local lowest=.venv-lowest/lowest.txt
    if [ -z "${PYTHON:-}" ] && python3.11 -c '' 2>/dev/null; then
        local PYTHON=python3.11 # the oldest supported one
    fi
    make_environment .venv-lowest
    .venv-lowest/bin/python scripts/lowest_versions.py >"$lowest"
    pip_install .venv-lowest "$lowest" "[dev,sweep]"
    {
        .venv-lowest/bin/python --version
        cat "$lowest"
    } >&2
}
