#!/usr/bin/env bash
# Train every combination of some settings, as a job array: one job of slurm/train.sh for each.
#
#   bash slurm/sweep.sh [options of sbatch] NAME=VALUE [NAME=VALUE ...] [options of training]
#   bash slurm/sweep.sh --gpus-per-node=1 recipe={notebook,notebook-bn} seed={0,1,2} --epochs=5     # six jobs
#
# A name that is given several times has several values (the shell makes seed=0 seed=1 seed=2 of seed={0,1,2}). Names
# are those of training's options (yes/no ones take true or false); what stands before the first goes to sbatch, what
# follows the last to each training. Each combination has its own run directory, runs/sweep/NAME=VALUE,...; the same
# command goes on with those that did not finish. Watch all: squeue --me; tensorboard --logdir runs/sweep
#
# With --search behind the names (see dist-mnist sweep --help), the jobs are workers of one search instead, each on one
# node, which share its trials; one that comes near its time limit saves, and is requeued:
#
#   bash slurm/sweep.sh --gpus-per-node=1 lr=loguniform:0.01:0.5 model={cnn,resnet} --search=tpe --trials=30
#
# What you may adapt, by setting variables:
#   SWEEP_DIR      where the run directories go (default: runs/sweep)
#   SWEEP_AT_ONCE  how many jobs may run at the same time (default: as many as there is room for; of a search: 4)
#   and all that slurm/train.sh has
set -euo pipefail

fail() { printf 'error: %s\n' "$*" >&2 && exit 2; }

names=() values=() sbatch=() train=() search=""
for word in "$@"; do
    case $word in
        -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
        --run-dir* | --dry-run) fail "$word cannot be given: each combination has a run directory of its own" ;;
        -*)
            [[ $word != --search && $word != --search=* ]] || search=yes
            if ((${#names[@]})); then train+=("$word"); else sbatch+=("$word"); fi ;;
        [a-z]*=*)
            ((${#train[@]} == 0)) || fail "$word stands behind options of training: give all NAME=VALUE before them"
            name=${word%%=*} && name=${name//-/_}
            [[ $name != run_dir && $name != dry_run ]] || fail "$word: each combination has a run directory of its own"
            names+=("$name") values+=("${word#*=}") ;;
        *) if ((${#train[@]})); then train+=("$word")
            elif ((${#names[@]} == 0)) && ((${#sbatch[@]})); then sbatch+=("$word")
            else fail "$word is not NAME=VALUE, such as lr=0.05"; fi ;;
    esac
done
((${#names[@]})) || fail "no settings to combine were given, such as seed={0,1,2}; see --help"

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || root=${DIST_MNIST_ROOT:-$SLURM_SUBMIT_DIR} # Slurm runs a copy from elsewhere

submit() { # submits so many jobs, as the words "$@" say
    local lines last=$(($1 - 1)) && shift
    mapfile -t lines < <(sed -n 's/^#SBATCH //p' "$root/slurm/train.sh") # what train.sh says to sbatch
    exec sbatch "${lines[@]}" --job-name=dist-mnist-sweep --output=slurm-%A_%a.out ${sbatch[@]+"${sbatch[@]}"} \
        --array="0-$last${SWEEP_AT_ONCE:+%$SWEEP_AT_ONCE}" "$root/slurm/sweep.sh" "$@"
}

work() { # as one worker of a search, until its trials are done or a stop request comes
    local python words=() i code=0 request=""
    python=$(bash "$root/launch/setup.sh")
    for i in "${!names[@]}"; do words+=("${names[i]}=${values[i]}"); done
    PYTHONUNBUFFERED=1 "${python%/*}/dist-mnist" sweep "${words[@]}" "${train[@]}" --run-dir="${SWEEP_DIR:-runs/sweep}" &
    trap 'request=USR1 && kill -TERM $!' USR1
    trap 'kill -TERM $!' TERM
    while wait $! || code=$?; kill -0 $! 2>/dev/null; do code=0; done # a signal ends the waiting, not the worker
    [[ -z $request ]] || scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    exit "$code"
}

if [[ -n $search ]]; then
    [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || work
    submit "${SWEEP_AT_ONCE:-4}" "$@"
fi

combinations=("") # each as lines NAME=VALUE
for name in $(printf '%s\n' "${names[@]}" | awk '!seen[$0]++'); do
    longer=()
    for combination in "${combinations[@]}"; do
        for i in "${!names[@]}"; do
            [[ ${names[i]} != "$name" ]] || longer+=("$combination${combination:+$'\n'}$name=${values[i]}")
        done
    done
    combinations=("${longer[@]}")
done

options_of() { # prints, a line each, the options of training for a combination
    local setting word name
    mapfile -t setting <<<"$1"
    ((${#train[@]} == 0)) || printf '%s\n' "${train[@]}" # before the combination, which wins
    for word in "${setting[@]}"; do
        name=${word%%=*} && name=${name//_/-}
        case ${word#*=} in
            true) echo "--$name" ;;
            false) echo "--no-$name" ;;
            *) echo "--$name=${word#*=}" ;;
        esac
    done
    name=${1//$'\n'/,}
    echo --run-dir="${SWEEP_DIR:-runs/sweep}/${name//\//_}"
}

if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    mapfile -t options < <(options_of "${combinations[SLURM_ARRAY_TASK_ID]}")
    exec bash "$root/slurm/train.sh" "${options[@]}"
fi

dist_mnist=$root/launch/in_image.sh
if [[ -z ${DIST_MNIST_IMAGE:-} ]]; then
    python=$(bash "$root/launch/setup.sh")
    dist_mnist=${python%/*}/dist-mnist
fi
twice=$(printf '%s\n' "${combinations[@]//$'\n'/,}" | sort | uniq -d | head -n 1)
[[ -z $twice ]] || fail "$twice is there twice: give each value once"
for i in "${!combinations[@]}"; do # a mistake is told now, and not by every job
    mapfile -t options < <(options_of "${combinations[i]}")
    run_dir=$("$dist_mnist" train --dry-run "${options[@]}" --device=cpu)
    printf '%4d  %s\n' "$i" "$run_dir"
done
submit "${#combinations[@]}" "$@"
