#!/usr/bin/env bash
# Train on several machines, without a scheduler.
#
#   bash launch/multinode.sh --hosts node1,node2 [options of training]
#
# starts the training on each host over ssh and shows what all of them say; Ctrl-C saves and ends it everywhere. Or,
# without ssh, type one command on each machine, with the name of any one of them as the place where they meet:
#
#   bash launch/multinode.sh --nnodes 2 --rdzv-endpoint node1:29400 [options of training]
#
# With --nnodes 1:4 a run goes on when a machine is lost and takes in those that come later. The repository, this folder,
# the data and the run directory have to be at the same path on all machines (a shared file system; --stage-data copies
# the data to each machine's own disk). Whether all fits together: add --doctor, which trains nothing.
#
# What you may adapt, by setting variables:
#   DIST_MNIST_SSH      how to reach a host (default: ssh, asking whether the host is there)
#   DIST_MNIST_PORT     where the hosts meet on this machine, which all must reach (default: any port that is free)
#   DIST_MNIST_ADDRESS  this machine's name or address, as the hosts know it (default: its host name)
#   DIST_MNIST_DATA     a folder of idx files, or one that holds such folders (default: data/ here)
#   NCCL_SOCKET_IFNAME  the network between the machines, if NCCL does not find the right one by itself
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
fail() { printf 'error: %s\n' "$*" >&2 && exit 2; }

hosts="" options=() nodes=() command=train previous="" asked=""
for option in "$@"; do
    case $option in
        -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
    esac
    case "$previous $option" in
        '--hosts '* | *' --hosts='*) hosts=${option#--hosts=} asked=yes ;;
        *' --hosts' | *' --nnodes') ;;
        *' --doctor') command=doctor ;;
        '--nnodes '* | *' --nnodes='*) nodes=(--nnodes "${option#--nnodes=}") ;;
        *) options+=("$option") ;;
    esac
    previous=$option
done
case $previous in --hosts | --nnodes) fail "$previous lacks its value; see --help" ;; esac
hosts=${hosts// /}
[[ -z $asked || (-n $hosts && ,$hosts, != *,,*) ]] || fail "--hosts takes names with commas between them: node1,node2"
[[ -z $hosts || ${options[*]-} != *--rdzv-* ]] || fail "--hosts sets where the hosts meet: leave --rdzv-... out"
python=$(bash "$root/launch/setup.sh")
dist_mnist=${python%/*}/dist-mnist
[[ -n $hosts ]] || exec "$dist_mnist" "$command" ${nodes[@]+"${nodes[@]}"} ${options[@]+"${options[@]}"}

IFS=, read -ra names <<<"$hosts"
((${#nodes[@]})) || nodes=(--nnodes "${#names[@]}")
read -ra ssh <<<"${DIST_MNIST_SSH:-ssh -o BatchMode=yes -o ServerAliveInterval=5 -o ServerAliveCountMax=6}"

# The hosts meet at a process of its own here, which outlives each of them.
coproc MEETING { trap '' INT TERM && exec "$dist_mnist" rendezvous --port "${DIST_MNIST_PORT:-0}"; }
meeting=$MEETING_PID
trap 'kill -KILL "$meeting" 2>/dev/null || true' EXIT
read -r endpoint <&"${MEETING[0]}" || fail "the place where the hosts are to meet could not be opened; see DIST_MNIST_PORT in --help"
endpoint=${DIST_MNIST_ADDRESS:-${endpoint%:*}}:${endpoint##*:}

# A host's part is asked to stop when its standard input ends: when this script closes it, dies, or is cut off.
printf -v part '%q ' env PYTHONUNBUFFERED=1 ${DIST_MNIST_DATA:+DIST_MNIST_DATA="$DIST_MNIST_DATA"} \
    ${NCCL_SOCKET_IFNAME:+NCCL_SOCKET_IFNAME="$NCCL_SOCKET_IFNAME"} "$dist_mnist" "$command" "${nodes[@]}" \
    --rdzv-endpoint="$endpoint" --rdzv-id="$(date +%s)-$$" ${options[@]+"${options[@]}"}
printf -v remote '%q ' bash -c "cd $(printf %q "$PWD") || exit; exec 3<&0; \
$part </dev/null & part=\$!; \
{ read -r _ <&3; kill -TERM \$part; } 2>/dev/null & ender=\$!; \
wait \$part; code=\$?; kill \$ender 2>/dev/null; exit \$code"

inputs=$(mktemp -u) && mkfifo -m 600 "$inputs"
exec 3<>"$inputs"
exec 4<"$inputs"
exec 5>"$inputs" 3>&- && rm "$inputs"
end_all() { exec 5>&-; }
trap end_all INT TERM

running=()
for name in "${names[@]}"; do
    (trap '' INT && exec "${ssh[@]}" "$name" "$remote" <&4 4<&- 5>&-) &
    running+=($!)
done

# A host that fails ends the run for all, unless it may go on with fewer.
code=0 elastic="" finished=""
[[ ${nodes[*]} != *:* ]] || elastic=yes
while ((${#running[@]})); do
    for i in "${!running[@]}"; do
        ! kill -0 "${running[i]}" 2>/dev/null || continue
        if wait "${running[i]}"; then finished=yes; else
            status=$?
            ((code)) || { code=$status && printf '%s ended with exit code %s\n' "${names[i]}" "$code" >&2; }
            [[ -n $elastic ]] || end_all
        fi
        unset "running[i]"
    done
    sleep 0.2 || true # Ctrl-C ends it as well
done
[[ -z $elastic || -z $finished ]] || code=0
exit "$code"
