#!/usr/bin/env bash
# Run the tests: the set-up of launch/local.sh with what the tests need, then pytest in the repository.
#
#   bash tests/run.sh [options of pytest]    such as -x, -k checkpoint, tests/data
#
# What you may adapt: see launch/setup.sh. With CI=true, root on Debian or Ubuntu gets python3-venv if it is missing.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
python=$(bash "$root/launch/setup.sh" test)
cd "$root"
exec "$python" -m pytest "$@"
