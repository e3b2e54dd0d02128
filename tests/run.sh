#!/usr/bin/env bash
# Run the tests: the set-up of launch/local.sh with what the tests need, then pytest in the repository.
#
#   bash tests/run.sh [options of pytest]        what matters for a change, in minutes: all units, the essential runs
#   bash tests/run.sh all [options of pytest]    everything, after tests/lint.sh
#   bash tests/run.sh bench [COMMIT] [options]   how fast this is beside another commit, by turns; judges nothing
#
# Options of pytest are such as -x, -k checkpoint, tests/unit/data, --co (but -h shows this); those of bench, and which
# commit it takes if none is given, are in tests/benchmarks/against.py.
#
# What you may adapt: -n, the tests that run at the same time (default: one for each core, and with `all` one more, as
# some wait), DIST_MNIST_TEST_DATA, a folder with the four files of real MNIST, without which the tests that need it are
# skipped, and what launch/setup.sh has. With CI=true, root on Debian or Ubuntu gets the packages without which some
# tests of `all` would be skipped: Slurm and its munge, iproute2, strace, on Debian a browser; and python3-venv if it is
# missing.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
PATH=$PATH:/usr/sbin:/sbin
at_once=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) tier=(-m quick)
if [[ ${1:-} == all ]]; then shift && tier=() at_once=$((at_once + 1)); fi
case ${1:-} in
    bench)
        shift
        python=$(bash "$root/launch/setup.sh" test)
        exec "$python" "$root/tests/benchmarks/against.py" --rounds 3 --steps 45 "$@"
        ;;
    -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
esac

are_there() { local name; for name in "$@"; do command -v "$name" >/dev/null || return; done; }
install() {
    echo "Installing $*, which some tests need ..." >&2
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qqy --no-install-recommends "$@"; } \
        &>/dev/null || echo "That could not be installed: these tests are skipped." >&2
}
if [[ ${#tier[@]} == 0 && ${CI:-} == true && $EUID == 0 ]] && are_there apt-get; then
    are_there slurmctld slurmd sbatch munged ip strace || install slurm-wlm munge iproute2 strace
    are_there chromium-headless-shell || are_there chromium || are_there google-chrome || install chromium-headless-shell
fi
python=$(bash "$root/launch/setup.sh" test)
[[ ${#tier[@]} != 0 ]] || bash "$root/tests/lint.sh"
cd "$root"
unset PYTHONDONTWRITEBYTECODE # or each of the many processes would compile the package anew
exec "$python" -m pytest -n "$at_once" --dist loadgroup ${tier[@]+"${tier[@]}"} "$@"
