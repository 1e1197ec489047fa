#!/usr/bin/env bash
# lowbit on a real GPU: build, correct, sanitize, bench. From a bare checkout on a machine with cmake, ninja, a Python with PyTorch,
# pytest and pybind11, and nvcc or a Mac's clang; nothing is downloaded or installed. bench/README.md says more, --help all.
#
#   bench/device_check.sh [build] [correct] [sanitize] [bench] [--budget SECONDS] [--out FOLDER] [--resume FOLDER] [--dry-run]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD/bench${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m device "$@"
