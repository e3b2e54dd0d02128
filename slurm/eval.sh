#!/usr/bin/env bash
# Evaluate a run or a checkpoint, or the average of several, on one node.
#
#   sbatch [--gpus=1 ...] slurm/eval.sh --ckpt RUN_DIR [--ckpt RUN_DIR ...] [--split test] [--json]
#
# Submit it from the repository. All options: dist-mnist eval --help
#
# What you may adapt: the #SBATCH lines below, which options of sbatch override, and two environment variables:
#   DIST_MNIST_ROOT   the repository, if you submit from another folder
#   DIST_MNIST_IMAGE  container image to run in: see launch/in_image.sh

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
[[ -n ${SLURM_JOB_ID:-} ]] || fail "this is a Slurm job: sbatch slurm/eval.sh (without Slurm: dist-mnist eval)"
root=${DIST_MNIST_ROOT:-$SLURM_SUBMIT_DIR}
[[ -f $root/slurm/eval.sh ]] || fail "$root is not the repository: submit from it, or set DIST_MNIST_ROOT to it"
[[ -z ${DIST_MNIST_IMAGE:-} ]] || exec bash "$root/launch/in_image.sh" eval "$@"
python=$(bash "$root/launch/setup.sh")
exec "${python%/*}/dist-mnist" eval "$@"
