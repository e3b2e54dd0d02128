#!/usr/bin/env bash
# Evaluate a run, a checkpoint, or several averaged, on one node.
#
#   sbatch [--gpus=1 ...] slurm/eval.sh --ckpt RUN_DIR [--ckpt RUN_DIR ...] [--split test] [--json]
#
# Submit it in the repository. All options: dist-mnist eval --help
#
# What you may adapt: the lines below (options of sbatch win over them), DIST_MNIST_ROOT: the repository, if this is not
# submitted there, and DIST_MNIST_IMAGE: a container image to run in (see launch/in_image.sh).

#SBATCH --job-name=dist-mnist-eval
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --time=00:10:00
#SBATCH --output=slurm-%j.out

set -euo pipefail

fail() { printf 'error: %s\n' "$*" >&2 && exit 2; }

for option in "$@"; do
    case $option in
        -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
    esac
done
[[ -n ${SLURM_JOB_ID:-} ]] || fail "this is a job for Slurm: sbatch slurm/eval.sh (without Slurm: dist-mnist eval)"
root=${DIST_MNIST_ROOT:-$SLURM_SUBMIT_DIR}
[[ -f $root/slurm/eval.sh ]] || fail "$root is not the repository: submit the job there, or set DIST_MNIST_ROOT to it"
[[ -z ${DIST_MNIST_IMAGE:-} ]] || exec bash "$root/launch/in_image.sh" eval "$@"
python=$(bash "$root/launch/setup.sh")
exec "${python%/*}/dist-mnist" eval "$@"
