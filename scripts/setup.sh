# Sourced by demo.sh and test.sh: an environment with Steersman in it. Uses the active virtual environment, or makes
# .venv beside the repository's README. Where there is no NVIDIA driver, the CPU build of PyTorch is installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi

from_pip() {
    python -m pip install --quiet --disable-pip-version-check "$@"
}

# uv takes seconds where pip takes minutes; pip where uv has no index to look in.
install() {
    python -m uv --version >/dev/null 2>&1 || from_pip uv || true
    python -m uv pip install --quiet "$@" 2>/dev/null || from_pip "$@"
}

if ! python -c "import torch" 2>/dev/null; then
    if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
        from_pip torch
    else
        # The CPU build: from where pip is set up to look, else through uv, which knows PyTorch's own index.
        from_pip "torch==2.13.0+cpu" 2>/dev/null ||
            { from_pip uv && python -m uv pip install --quiet --torch-backend=cpu "torch>=2.11"; } ||
            from_pip "torch==2.13.0"
    fi
fi
