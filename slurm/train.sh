#!/usr/bin/env bash
# Train on all nodes and GPUs of this Slurm job; resumes automatically after preemption and time limits.
#
#   sbatch [--nodes=2 --gpus-per-node=4 ...] slurm/train.sh [training options]
#
# Run `bash launch/setup.sh` on the login node, then submit this script from the repository, on storage that all nodes
# share. Each node runs one process per GPU, or one without GPUs (--nproc N runs N). The same command resumes a run that
# did not finish. All training options: dist-mnist train --help
#
# During training, `scancel --signal=USR1 JOB` saves and requeues; `scancel JOB` saves and ends. Logs: slurm-JOB.out,
# and one file per node in the run directory's logs/.
#
# What you may adapt: the #SBATCH lines below, which options of sbatch override, and these environment variables:
#   DIST_MNIST_ROOT     the repository, if you submit from another folder; relative paths are still of that folder
#   DIST_MNIST_DATA     data folder (default: data/ where you submit; if it is empty, the job tries to download MNIST)
#   DIST_MNIST_VENV     virtual environment (default: .venv in the repository)
#   DIST_MNIST_IMAGE    container image to train in, instead of installing packages: see launch/in_image.sh
#   NCCL_SOCKET_IFNAME  network interface between nodes, such as ib0, if NCCL does not choose the right one

#SBATCH --job-name=dist-mnist
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --time=01:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
# Cores (--cpus-per-task) are per node: two per GPU, or all cores for training on CPUs. --signal sets how many seconds
# before the time limit the job gets a stop request: enough for a step and a checkpoint.
# #SBATCH --partition=gpu
# #SBATCH --gpus-per-node=4

set -euo pipefail

UNFINISHED=75 # exit code of a job that saved a checkpoint but is not requeued

say() { printf '%s\n' "$*"; }
fail() { say "error: $*" >&2 && exit 2; }

for option in "$@"; do
    case $option in
        -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
    esac
done
[[ -n ${SLURM_JOB_ID:-} ]] || fail "this is a Slurm job: sbatch slurm/train.sh (without Slurm: launch/local.sh)"
root=${DIST_MNIST_ROOT:-$SLURM_SUBMIT_DIR}
[[ -f $root/slurm/train.sh ]] || fail "$root is not the repository: submit from it, or set DIST_MNIST_ROOT to it"

job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # SLURM_JOB_ID of the last task is the array's
job=${job:-$SLURM_JOB_ID}

# Stop requests from Slurm or its user are forwarded to the training once all nodes are up: srun loses earlier ones.
request="" srun="" early="" up=""
# shellcheck disable=SC2317 # traps call it
# shellcheck disable=SC2329 # the traps call it
ask() { request=$1; if [[ -n $up ]]; then pass_on "$1"; else early=$1; fi; }
pass_on() { kill -s "$1" "$srun" 2>/dev/null || true; }
trap 'ask USR1' USR1
trap 'ask TERM' TERM

# First check everything that one node can check alone, while the rendezvous endpoint starts in the background. It is a
# separate process, so that it outlives the nodes' agents. It keeps a free port, so that no other job can use it.
dist_mnist=$root/launch/in_image.sh
if [[ -z ${DIST_MNIST_IMAGE:-} ]]; then
    python=$(bash "$root/launch/setup.sh")
    dist_mnist=${python%/*}/dist-mnist
fi
coproc RENDEZVOUS { trap '' INT TERM USR1 && exec "$dist_mnist" rendezvous --port 0; }
rendezvous=$RENDEZVOUS_PID
exec {answer}<&"${RENDEZVOUS[0]}"
trap 'kill -KILL "$rendezvous" 2>/dev/null || true' EXIT

nodes=(--nnodes="$SLURM_JOB_NUM_NODES" --rdzv-id="$SLURM_JOB_ID")
run_dir=$("$dist_mnist" train --dry-run "${nodes[@]}" --rdzv-endpoint="$SLURMD_NODENAME:1" "$@") || exit
read -r endpoint <&"$answer" || fail "the rendezvous endpoint could not be opened on $SLURMD_NODENAME"

newest() { find "$run_dir/checkpoints" -name 'step-*.safetensors' 2>/dev/null | sort | tail -n 1; }
logs=$run_dir/logs
mkdir -p "$logs" "$run_dir/checkpoints"
before=$(newest)
rm -f "$run_dir/stopped.json" "$logs"/up-*
nodes_are_up() { local there=("$logs"/up-*); [[ -e ${there[0]} && ${#there[@]} -ge $SLURM_JOB_NUM_NODES ]]; }
say "job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST; logs of the nodes in $logs"

# One agent per node. Its output is also copied to the node's log, but not by a child of the agent, which would mistake
# it for a rank. Stop requests are for the agent only.
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
    while wait "$srun" || code=$?; kill -0 "$srun" 2>/dev/null; do code=0; done # a signal interrupts wait, not srun
fi

rm -f "$logs"/up-*

# Finished, failed, or stopped by request? If so, by whose?
after=$(newest)
if [[ ! -f $run_dir/stopped.json ]] && { [[ -z $request ]] || [[ -f $run_dir/result.json ]]; }; then exit "$code"; fi
state=$(squeue --noheader --job="$job" --format=%T) || state=RUNNING
if [[ $state != RUNNING ]]; then
    say "job $job was stopped by Slurm or its user; unless Slurm requeues it, resume with:"
elif [[ $after == "$before" ]]; then
    say "this start saved no new checkpoint, so the job is not requeued. Resume with more time (--time):"
elif say "job $job is requeued, to resume from $(basename "$after" .safetensors)" && scontrol requeue "$job"; then
    exit # Slurm ends this script when it requeues the job
else
    say "this cluster does not let the job requeue itself; resume with:"
fi
printf '  sbatch [...]'
printf ' %q' "${DIST_MNIST_ROOT:+$root/}slurm/train.sh" "$@"
say
exit "$UNFINISHED"
