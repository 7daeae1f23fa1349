#!/usr/bin/env bash
# Install what is missing and run all tests, or those that pytest's arguments choose: bash tests/run.sh tests/data -k packing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash install.sh
exec .venv/bin/python -m pytest "$@"
