#!/usr/bin/env bash
# Install what is missing and run all tests, or those that pytest's arguments choose: bash tests/run.sh tests/data -k packing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash install.sh
if [ $# -gt 0 ]; then
    exec .venv/bin/python -m pytest "$@"
fi
# Groups of tests in processes of their own, as many at once as there are cores for them, the longest first. Not
# pytest-xdist, whose threads are no company for tests that fork ranks.
groups=(tests/test_readme.py tests/tools tests/training tests/data tests/commands)
for group in tests/*/ tests/test_*.py; do
    group=${group%/}
    if [[ " ${groups[*]} " != *" $group "* ]] && { [ -f "$group" ] || compgen -G "$group/test_*.py" >/dev/null; }; then
        groups+=("$group")
    fi
done
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
run_group() {
    local log=$logs/${1//\//-} status=0
    .venv/bin/python -m pytest "$1" >"$log" 2>&1 || status=$?
    if [ "$status" = 0 ]; then
        echo "== $1: $(tail -n 1 "$log")"
    else
        echo "== $1"
        cat "$log"
    fi
    return "$status"
}
export -f run_group
export logs
printf '%s\n' "${groups[@]}" | xargs -P 2 -I {} bash -c 'run_group {}'
