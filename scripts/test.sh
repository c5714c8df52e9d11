#!/usr/bin/env bash
# Install the test extras and run every check: style, types, tests and the examples in the documentation.
# Further arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install -e ".[test]"
ruff check .
ruff format --check .
basedpyright
exec python -m pytest "$@"
