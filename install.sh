#!/usr/bin/env bash
# Make .venv and install mmcore with pinned dependencies. Does nothing when that is already so.
# PYTHON=/path/to/python chooses the interpreter.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$root/.venv
stamp=$venv/mmcore-installed
wanted="$root $(cat "$root/setup.py" "$root/constraints.txt" "$root/install.sh" | sha256sum)"

fail() {
    echo "install.sh: $*" >&2
    exit 1
}

# The first suitable interpreter, since a distribution's own python3 may be too new.
find_python() {
    for python in ${PYTHON:-python3 python3.12 python3.11 python3.10}; do
        if "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            "$python" -c 'import ensurepip, venv' 2>/dev/null ||
                fail "$python cannot make virtual environments: install its venv package (Debian, Ubuntu: apt install python3-venv)"
            return
        fi
    done
    fail "no Python 3.10, 3.11 or 3.12 (looked at: ${PYTHON:-python3 python3.12 python3.11 python3.10}): install one, or name it with PYTHON=/path/to/python"
}

is_ready() { "$venv/bin/python" -m pip --version >/dev/null 2>&1; }

found=$(cat "$stamp" 2>/dev/null || true)
if [ "$found" = "$wanted" ]; then
    exit 0
fi
case $found in
    "$root "*) ;;                        # ours, of other versions: pip updates it
    "") is_ready || venv_is=unusable ;;  # none, or the user's own
    *) venv_is=unusable ;;               # interrupted, or moved here from another folder
esac
if [ -n "${venv_is:-}" ]; then
    find_python
    echo "making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi
echo unfinished >"$stamp"
echo "installing mmcore and its dependencies: some minutes and 6 GB the first time (details: $venv/install.log)"
"$venv/bin/python" -m pip install --disable-pip-version-check --constraint "$root/constraints.txt" \
    --editable "${root}[eval,serve,dev,quickstart]" >"$venv/install.log" 2>&1 ||
    fail "pip could not install (the end of $venv/install.log):"$'\n'"$(tail -n 12 "$venv/install.log")"
echo "$wanted" >"$stamp"
