#!/usr/bin/env bash
# Run everything several times in a row, beside a process that keeps one core busy: does an outcome depend on speed?
#
#   bash tests/repeat.sh [TIMES]      10 times by default
#
# Each round is `bash tests/run.sh all` and gives a line: its number, its seconds, and pytest's last line. A round that
# fails shows all it printed, and ends this. What you may adapt: what tests/run.sh has.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
case ${1:-10} in
    -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
    *[!0-9]*) echo "error: repeat.sh takes a number of times; $1 was given" >&2 && exit 2 ;;
esac

(while :; do :; done) &
busy=$!
log=$(mktemp)
trap 'kill "$busy"; rm -f "$log"' EXIT
for ((round = 1; round <= ${1:-10}; round++)); do
    began=$SECONDS
    bash "$root/tests/run.sh" all >"$log" 2>&1 || { cat "$log"; echo "round $round failed"; exit 1; }
    echo "round $round: $((SECONDS - began)) s, $(tail -n 1 "$log")"
done
