#!/usr/bin/env bash
# Build the documentation's site in site/ (another folder: --out DIR). To look at it, with its search:
# python -m http.server -d site
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install -e ".[docs]"
exec python scripts/dev/site.py "$@"
