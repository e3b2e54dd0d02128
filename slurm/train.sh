#!/usr/bin/env bash
# Train on all nodes and GPUs that Slurm gives this job; goes on by itself after preemption and time limits.
#
#   sbatch [--nodes=2 --gpus-per-node=4 ...] slurm/train.sh [options of training]
#
# Submit it in the repository, on storage that all nodes share, after `bash launch/setup.sh` on the login node. Each node
# runs one process for each of its GPUs, or one without GPUs (--nproc N runs N). The same command goes on with a run
# that did not finish. All options of training: dist-mnist train --help
#
# Once it trains, `scancel --signal=USR1 JOB` saves and requeues; `scancel JOB` saves and ends. Logs: slurm-JOB.out, and a
# file for each node in the run directory's logs/.
#
# What you may adapt: the lines below (options of sbatch win over them), and these variables:
#   DIST_MNIST_ROOT     the repository, if this is not submitted there (other paths are still meant from there)
#   DIST_MNIST_DATA     where the data is (default: data/ in the repository; if it is empty, the job tries a download)
#   DIST_MNIST_IMAGE    a container image to train in; nothing is installed then: see launch/in_image.sh
#   NCCL_SOCKET_IFNAME  the network between nodes, such as ib0, if NCCL does not find the right one by itself

#SBATCH --job-name=dist-mnist
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --time=01:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
# Cores (--cpus-per-task) are per node: two for each GPU, or all that are to compute. The signal comes so many seconds
# before the time limit, which has to be enough for a step and a checkpoint.
# #SBATCH --partition=gpu
# #SBATCH --gpus-per-node=4

set -euo pipefail

UNFINISHED=75 # exit code of a job that saved but does not go on by itself

say() { printf '%s\n' "$*"; }
fail() { say "error: $*" >&2 && exit 2; }

for option in "$@"; do
    case $option in
        -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
    esac
done
[[ -n ${SLURM_JOB_ID:-} ]] || fail "this is a job for Slurm: sbatch slurm/train.sh (without Slurm: launch/local.sh)"
root=${DIST_MNIST_ROOT:-$SLURM_SUBMIT_DIR}
[[ -f $root/slurm/train.sh ]] || fail "$root is not the repository: submit the job there, or set DIST_MNIST_ROOT to it"

job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # an array's last task has the array's own number
job=${job:-$SLURM_JOB_ID}

# A request to stop, from Slurm or its user, is passed on to the training when all nodes are there: before, srun loses it.
request="" srun="" early="" up=""
# shellcheck disable=SC2317 # traps call it
# shellcheck disable=SC2329 # the traps call it
ask() { request=$1; if [[ -n $up ]]; then pass_on "$1"; else early=$1; fi; }
pass_on() { kill -s "$1" "$srun" 2>/dev/null || true; }
trap 'ask USR1' USR1
trap 'ask TERM' TERM

# First everything that one node can check by itself, while the meeting place of all nodes starts beside it: a process
# of its own, which takes any free port and keeps it, so that no other job can have it, and outlives the nodes' agents.
dist_mnist=$root/launch/in_image.sh
if [[ -z ${DIST_MNIST_IMAGE:-} ]]; then
    python=$(bash "$root/launch/setup.sh")
    dist_mnist=${python%/*}/dist-mnist
fi
coproc MEETING { trap '' INT TERM USR1 && exec "$dist_mnist" rendezvous --port 0; }
meeting=$MEETING_PID
exec {answer}<&"${MEETING[0]}"
trap 'kill -KILL "$meeting" 2>/dev/null || true' EXIT

nodes=(--nnodes="$SLURM_JOB_NUM_NODES" --rdzv-id="$SLURM_JOB_ID")
run_dir=$("$dist_mnist" train --dry-run "${nodes[@]}" --rdzv-endpoint="$SLURMD_NODENAME:1" "$@") || exit
read -r endpoint <&"$answer" || fail "the meeting place of the nodes could not be opened on $SLURMD_NODENAME"

newest() { find "$run_dir/checkpoints" -name 'step-*.safetensors' 2>/dev/null | sort | tail -n 1; }
logs=$run_dir/logs
mkdir -p "$logs" "$run_dir/checkpoints"
before=$(newest)
rm -f "$run_dir/stopped.json" "$logs"/up-*
nodes_are_up() { local there=("$logs"/up-*); [[ -e ${there[0]} && ${#there[@]} -ge $SLURM_JOB_NUM_NODES ]]; }
say "job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST; logs of the nodes in $logs"

# On each node one agent, whose output goes to the node's own log as well: through no child of the agent, which takes its
# children for ranks. A request to stop is for the agent alone.
# shellcheck disable=SC2016
on_node=': >"$1/up-$SLURMD_NODENAME"; log=$1/$SLURM_JOB_ID-$SLURMD_NODENAME.log; shift
exec > >( (trap "" INT TERM USR1; exec tee -a "$log") <&0 & ) 2>&1
exec "$@"'
code=0
if [[ -z $request ]]; then
    PYTHONUNBUFFERED=1 srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
        --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --cpu-bind=none --kill-on-bad-exit=1 bash -c "$on_node" node "$logs" \
        "$dist_mnist" train "${nodes[@]}" --rdzv-endpoint="$SLURMD_NODENAME:${endpoint##*:}" "$@" &
    srun=$!
    until nodes_are_up || ! kill -0 "$srun" 2>/dev/null; do sleep 0.2; done
    up=yes
    [[ -z $early ]] || pass_on "$early"
    while wait "$srun" || code=$?; kill -0 "$srun" 2>/dev/null; do code=0; done # a signal ends the waiting, not srun
fi

rm -f "$logs"/up-*

# Finished, failed, or asked to stop; then by whom?
after=$(newest)
if [[ ! -f $run_dir/stopped.json ]] && { [[ -z $request ]] || [[ -f $run_dir/result.json ]]; }; then exit "$code"; fi
state=$(squeue --noheader --job="$job" --format=%T) || state=RUNNING
if [[ $state != RUNNING ]]; then
    say "job $job ends by order of Slurm or its user; unless Slurm requeues it, go on with:"
elif [[ $after == "$before" ]]; then
    say "this start came to no new checkpoint: the job is not requeued. With more time (--time), go on with:"
elif say "job $job is requeued, to go on after $(basename "$after" .safetensors)" && scontrol requeue "$job"; then
    exit # Slurm ends this script as it requeues the job
else
    say "this cluster does not let the job requeue itself; go on with:"
fi
printf '  sbatch [...]'
printf ' %q' "${DIST_MNIST_ROOT:+$root/}slurm/train.sh" "$@"
say
exit "$UNFINISHED"
