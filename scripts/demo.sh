#!/usr/bin/env bash
# Install Steersman and run the quickstart on the bundled model. Further arguments go to `steersman quickstart`.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install -e .
exec steersman quickstart "$@"
