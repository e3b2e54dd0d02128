#!/usr/bin/env bash
# Run the tests: the set-up of launch/local.sh with what the tests need, then pytest in the repository.
#
#   bash tests/run.sh [options of pytest]    such as -x, -k checkpoint, tests/data, --co (but -h shows this)
#
# What you may adapt: -n, the tests that run at the same time (3, of which some wait), and what launch/setup.sh has. With
# CI=true, root on Debian or Ubuntu gets the packages without which some tests would be skipped: Slurm and its munge,
# iproute2, shellcheck; and python3-venv if it is missing.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
PATH=$PATH:/usr/sbin:/sbin
case ${1:-} in
    -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
esac

are_there() { local name; for name in "$@"; do command -v "$name" >/dev/null || return; done; }
if [[ ${CI:-} == true && $EUID == 0 ]] && are_there apt-get &&
    ! are_there slurmctld slurmd sbatch munged ip shellcheck; then
    echo "Installing Slurm, munge, iproute2 and shellcheck, which some tests need ..." >&2
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -qqy --no-install-recommends slurm-wlm munge iproute2 shellcheck; } \
        &>/dev/null || echo "They could not be installed: these tests are skipped." >&2
fi
python=$(bash "$root/launch/setup.sh" test)
cd "$root"
unset PYTHONDONTWRITEBYTECODE # or each of the many processes would compile the package anew
exec "$python" -m pytest -n 3 --dist loadgroup "$@"
