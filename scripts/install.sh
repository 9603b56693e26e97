# Sourced by demo.sh and test.sh: makes .venv once and installs the project into it, in place.
# usage: install EXTRAS ("" or "[dev]")
install() {
    local extras=$1 python=${PYTHON:-python3}
    local stamp=".venv/.installed${extras}"
    if [ ! -x .venv/bin/python ]; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
            echo "cap needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2
            exit 1
        }
        "$python" -m venv .venv || {
            echo "cannot make .venv (on Debian: apt install python3-venv)" >&2
            exit 1
        }
    fi
    # Reinstall only when what is to be installed has changed.
    if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
        echo "installing into .venv (torch is large; about a minute or two)" >&2
        .venv/bin/python -m pip install --quiet --disable-pip-version-check \
            --constraint constraints.txt --editable ".${extras}"
        touch "$stamp"
    fi
}
