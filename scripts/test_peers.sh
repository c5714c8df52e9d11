#!/usr/bin/env bash
# Hold Steersman against the libraries whose files it reads and writes (eai-sparsify, SAELens, dictionary-learning,
# SAEBench), in an environment of its own, .venv-peers, so that their requirements never meet a user's. PEERS_ENV names another one.
# Fails, and says so, where the libraries cannot be installed. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

give_up() {
    echo "test_peers: $1: the tests against the peers did NOT run" >&2
    exit 1
}

env="${PEERS_ENV:-.venv-peers}"
[ -x "$env/bin/python" ] || "${PYTHON:-python3}" -m venv "$env" || give_up "the environment $env could not be made"
# shellcheck disable=SC1091
source "$env/bin/activate"
# PyTorch first, as the tests of the repository get it: the libraries would ask for a build of several gigabytes.
trap 'give_up "the environment $env could not be filled"' ERR
# shellcheck disable=SC1091
source scripts/setup.sh
install -e ".[peers,test]"
# Its own requirements ask for other versions than SAELens does, and its SAEs need none of them.
install --no-deps "dictionary-learning>=0.1"
# The same holds of SAEBench and of the probes it runs.
install --no-deps "sae-bench>=0.6" "sae-probes>=0.4.2" scikit-learn threadpoolctl xgboost zstandard tabulate
trap - ERR
exec python -m pytest tests/peers -p no:cacheprovider "$@"
