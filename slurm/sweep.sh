#!/usr/bin/env bash
# Train all combinations of some settings as a job array, with one job of slurm/train.sh for each combination.
#
#   bash slurm/sweep.sh [sbatch options] NAME=VALUE [NAME=VALUE ...] [training options]
#   bash slurm/sweep.sh --gpus-per-node=1 recipe={notebook,notebook-bn} seed={0,1,2} --epochs=5     # six jobs
#
# Repeat a name to give it several values (the shell expands seed={0,1,2} to seed=0 seed=1 seed=2). Names are those of
# the training options; flags have the values true and false. Options before the first name go to sbatch, options after
# the last one to each training run. Each combination has its own run directory, runs/sweep/NAME=VALUE,...; run the same
# command again to resume those that did not finish. Monitor all: squeue --me; tensorboard --logdir runs/sweep
#
# With --search after the names (see dist-mnist sweep --help), the jobs are workers of one search instead. Each runs on
# one node, and they share the trials. A worker near its time limit saves its trial and is requeued to resume it:
#
#   .venv/bin/pip install -c launch/constraints.txt -e '.[search]'     once, after launch/setup.sh
#   bash slurm/sweep.sh --gpus-per-node=1 lr=loguniform:0.01:0.5 model={cnn,resnet} --search=tpe --trials=30
#
# What you may adapt, by environment variables:
#   SWEEP_DIR      parent of the run directories (default: runs/sweep)
#   SWEEP_AT_ONCE  largest number of jobs that run at the same time (default: unlimited; for a search: 4)
#   and all variables of slurm/train.sh
set -euo pipefail

say() { printf '%s\n' "$*"; }
fail() { say "error: $*" >&2 && exit 2; }
UNFINISHED=75 # exit code of a worker that saved but does not go on by itself

names=() values=() sbatch=() train=() search=()
for word in "$@"; do
    case $word in
        -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
        --run-dir* | --dry-run) fail "$word is not allowed: each combination has its own run directory" ;;
        -*)
            [[ $word != --search && $word != --search=* ]] || search=(yes)
            if ((${#names[@]})); then train+=("$word"); else sbatch+=("$word"); fi ;;
        [a-z]*=*)
            ((${#train[@]} == 0)) || fail "$word comes after training options: give all NAME=VALUE before them"
            name=${word%%=*} && name=${name//-/_}
            [[ $name != run_dir && $name != dry_run ]] || fail "$word: each combination has its own run directory"
            names+=("$name") values+=("${word#*=}") ;;
        *) if ((${#train[@]})); then train+=("$word")
            elif ((${#names[@]} == 0)) && ((${#sbatch[@]})); then sbatch+=("$word")
            else fail "expected NAME=VALUE, such as lr=0.05, got $word"; fi ;;
    esac
done
((${#names[@]})) || fail "no settings to combine, such as seed={0,1,2}; see --help"

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || root=${DIST_MNIST_ROOT:-$SLURM_SUBMIT_DIR} # Slurm runs a copy from elsewhere

submit() { # submit $1 jobs of this script with the remaining arguments
    local lines last=$(($1 - 1)) && shift
    mapfile -t lines < <(sed -n 's/^#SBATCH //p' "$root/slurm/train.sh") # the sbatch options of train.sh
    [[ $PWD -ef $root ]] || export DIST_MNIST_ROOT=$root # the jobs' copy of this script does not know it
    exec sbatch "${lines[@]}" --job-name=dist-mnist-sweep --output=slurm-%A_%a.out ${sbatch[@]+"${sbatch[@]}"} \
        --array="0-$last${SWEEP_AT_ONCE:+%$SWEEP_AT_ONCE}" "$root/slurm/sweep.sh" "$@"
}

set_up() { # makes `dist_mnist` the command, in the image if there is one
    local python
    dist_mnist=$root/launch/in_image.sh
    if [[ -z ${DIST_MNIST_IMAGE:-} ]]; then
        python=$(bash "$root/launch/setup.sh")
        dist_mnist=${python%/*}/dist-mnist
    fi
}

work() { # as one worker of a search, until its trials are done or a stop request comes
    local code=0 request="" worker="" job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID start saved
    # shellcheck disable=SC2317 # the traps call it
    # shellcheck disable=SC2329 # the traps call it
    stop() { [[ -z $worker ]] || kill -TERM "$worker" 2>/dev/null || true; }
    trap 'request=yes && stop' USR1
    trap stop TERM
    set_up
    mkdir -p "$sweep" && start=$(mktemp "$sweep/.start-XXXXXX")
    if [[ -z $request ]]; then
        PYTHONUNBUFFERED=1 "$dist_mnist" sweep "${search[@]}" &
        worker=$!
        while wait "$worker" || code=$?; kill -0 "$worker" 2>/dev/null; do code=0; done # a signal ends the waiting alone
    fi
    saved=$(find "$sweep" -name 'step-*.safetensors' -newer "$start" -print -quit)
    rm -f "$start"
    [[ -n $request ]] || exit "$code"
    if [[ -z $saved ]]; then
        say "this start came to no new checkpoint: the job is not requeued. With more time (--time), go on with:"
    elif say "job $job is requeued, to resume the search" && scontrol requeue "$job"; then
        exit # Slurm ends this script as it requeues the job
    else
        say "this cluster does not let the job requeue itself; go on with:"
    fi
    printf '  bash slurm/sweep.sh [...]' && printf ' %q' "${given[@]}" && say
    exit "$UNFINISHED"
}

if ((${#search[@]})); then
    sweep=${SWEEP_DIR:-runs/sweep} given=() search=()
    for i in "${!names[@]}"; do given+=("${names[i]}=${values[i]}"); done
    given+=("${train[@]}") search=("${given[@]}" --run-dir="$sweep")
    [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || work
    set_up
    [[ -e $sweep/search/journal.log ]] || "$dist_mnist" sweep "${search[@]}" --device=cpu --dry-run >/dev/null # a mistake is told now
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

options_of() { # print the training options of a combination, one per line
    local setting word name
    mapfile -t setting <<<"$1"
    ((${#train[@]} == 0)) || printf '%s\n' "${train[@]}" # before the combination, which overrides them
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

set_up
twice=$(printf '%s\n' "${combinations[@]//$'\n'/,}" | sort | uniq -d | head -n 1)
[[ -z $twice ]] || fail "$twice is repeated: give each value once"
for i in "${!combinations[@]}"; do # report mistakes now, not in each job
    mapfile -t options < <(options_of "${combinations[i]}")
    run_dir=$("$dist_mnist" train --dry-run "${options[@]}" --device=cpu)
    printf '%4d  %s\n' "$i" "$run_dir"
done
submit "${#combinations[@]}" "$@"
