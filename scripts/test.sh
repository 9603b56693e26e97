#!/usr/bin/env bash
# Lint, type-check and test.
#
#   scripts/test.sh [PYTEST ARGUMENTS]            with the versions in constraints.txt, in .venv
#   scripts/test.sh --all [PYTEST ARGUMENTS]      also the tests marked `slow`: two minutes more
#   scripts/test.sh --lowest [PYTEST ARGUMENTS]   all tests with the lowest versions that
#                                                 pyproject.toml allows, in .venv-lowest
#
# The first run makes the environment: some GB with torch, again as many for --lowest.
# --lowest runs the tests alone. Old versions of ruff and mypy judge the same code by other rules,
# and what they find says nothing about the versions that the code runs with.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
-h | --help)
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' scripts/test.sh
    exit
    ;;
esac
# Two processes, which keep two cores busy; tests that take more than five seconds are named.
pytest=(--numprocesses 2 --dist worksteal --durations 20 --durations-min 5)
. scripts/install.sh
if [ "${1:-}" = --lowest ]; then
    shift
    install_lowest
    exec .venv-lowest/bin/python -m pytest "${pytest[@]}" "$@"
fi
which=(-m "not slow")
if [ "${1:-}" = --all ]; then
    shift
    which=()
fi
install "[dev]"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest "${pytest[@]}" "${which[@]}" "$@"
