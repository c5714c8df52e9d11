#!/usr/bin/env bash
# Test the kernels with Triton 3.6, which comes with the PyTorch of many GPU machines, in an environment of its own,
# .venv-triton36: what its compiler and assembler make of every kernel for sm_80 and sm_90, and the kernels under its
# interpreter, which needs NumPy before 2.4. TRITON36_ENV names another environment. Needs no GPU, and some ten minutes.
# Fails, and says so, where these versions cannot be installed. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

give_up() {
    echo "test_triton36: $1: the kernels were NOT tested with Triton 3.6" >&2
    exit 1
}

env="${TRITON36_ENV:-.venv-triton36}"
[ -x "$env/bin/python" ] || "${PYTHON:-python3}" -m venv "$env" || give_up "the environment $env could not be made"
# shellcheck disable=SC1091
source "$env/bin/activate"
trap 'give_up "the environment $env could not be filled"' ERR
# shellcheck disable=SC1091
source scripts/setup.sh
install "triton==3.6.*" "numpy>=2.0,<2.4" einops safetensors transformers pytest pytest-xdist hypothesis
trap - ERR
python -c 'import triton; assert triton.__version__.startswith("3.6."), triton.__version__' || give_up "another Triton is there"
processes=$(nproc)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec python -m pytest tests/test_kernels_compiled.py tests/test_kernels_triton_*.py -p no:cacheprovider \
    -n "$((processes < 8 ? processes : 8))" --dist loadfile "$@"
