#!/usr/bin/env bash
# Install what is missing and run all tests, or those that pytest's arguments choose: bash tests/run.sh tests/data -k packing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash install.sh
if [ $# -gt 0 ]; then
    exec .venv/bin/python -m pytest "$@"
fi
# The converters' tests beside all others: each half keeps one core busy. Not pytest-xdist, whose threads are no
# company for tests that fork ranks.
log=$(mktemp)
trap 'rm -f "$log"; kill "$converters" 2>/dev/null || true' EXIT
.venv/bin/python -m pytest tests/tools >"$log" 2>&1 &
converters=$!
status=0
.venv/bin/python -m pytest --ignore tests/tools || status=$?
wait "$converters" || status=$?
echo "== tests/tools"
cat "$log"
exit "$status"
