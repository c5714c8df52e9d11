#!/usr/bin/env bash
# Install the test extras and run every check: style, types, tests and the examples in the documentation.
# Tests run in one process more than there are processors, up to eight, as some wait for others; modules in the order of
# tests/conftest.py. Further arguments go to pytest (-n 0: one process).
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install -e ".[test]"
ruff check .
ruff format --check .
basedpyright
processes=$(($(nproc) + 1))
exec python -m pytest -n "$((processes < 8 ? processes : 8))" --dist loadfile --no-loadscope-reorder "$@"
