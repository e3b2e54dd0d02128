#!/usr/bin/env bash
# Train on several nodes without a scheduler.
#
#   bash launch/multinode.sh --hosts node1,node2 [training options]
#
# starts training on each host over ssh and shows the output of all; Ctrl-C saves a checkpoint and stops all hosts.
# Without ssh, run one command on each node, with any of them as the rendezvous endpoint:
#
#   bash launch/multinode.sh --nnodes 2 --rdzv-endpoint node1:29400 [training options]
#
# With --nnodes 1:4, a run resumes without a node that is lost, and nodes may join later. The repository, the working
# directory, the data and the run directory must have the same paths on all nodes (a shared file system; --stage-data
# copies the data to each node's local disk). To check the set-up without training, add --doctor.
#
# What you may adapt, by environment variables:
#   DIST_MNIST_SSH      command to reach a host (default: ssh with keep-alive messages)
#   DIST_MNIST_PORT     port of the rendezvous endpoint on this machine, reachable by all hosts (default: any free one)
#   DIST_MNIST_ADDRESS  name or address of this machine as seen by the hosts (default: its host name)
#   DIST_MNIST_DATA     folder of idx files, or of sub-folders of them (default: data/ in the working directory)
#   NCCL_SOCKET_IFNAME  network interface between the nodes, such as ib0, if NCCL does not choose the right one
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
case $previous in --hosts | --nnodes) fail "$previous needs a value; see --help" ;; esac
hosts=${hosts// /}
[[ -z $asked || (-n $hosts && ,$hosts, != *,,*) ]] || fail "--hosts expects comma-separated names: node1,node2"
[[ -z $hosts || ${options[*]-} != *--rdzv-* ]] || fail "--hosts sets the rendezvous endpoint: omit --rdzv-... options"
python=$(bash "$root/launch/setup.sh")
dist_mnist=${python%/*}/dist-mnist
[[ -n $hosts ]] || exec "$dist_mnist" "$command" ${nodes[@]+"${nodes[@]}"} ${options[@]+"${options[@]}"}

IFS=, read -ra names <<<"$hosts"
((${#nodes[@]})) || nodes=(--nnodes "${#names[@]}")
read -ra ssh <<<"${DIST_MNIST_SSH:-ssh -o BatchMode=yes -o ServerAliveInterval=5 -o ServerAliveCountMax=6}"

# The rendezvous endpoint is a separate process on this machine, so that it outlives the processes on the hosts.
coproc RENDEZVOUS { trap '' INT TERM && exec "$dist_mnist" rendezvous --port "${DIST_MNIST_PORT:-0}"; }
rendezvous=$RENDEZVOUS_PID
trap 'kill -KILL "$rendezvous" 2>/dev/null || true' EXIT
read -r endpoint <&"${RENDEZVOUS[0]}" || fail "cannot open the rendezvous endpoint; see DIST_MNIST_PORT in --help"
endpoint=${DIST_MNIST_ADDRESS:-${endpoint%:*}}:${endpoint##*:}

# The process on a host gets a stop request at the end of its standard input: if this script closes it, dies, or is
# disconnected.
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

# A host that fails ends the run on all hosts, unless the run is elastic.
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
    sleep 0.2 || true # Ctrl-C interrupts it too
done
[[ -z $elastic || -z $finished ]] || code=0
exit "$code"
