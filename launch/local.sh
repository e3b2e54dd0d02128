#!/usr/bin/env bash
# Train on this machine, with one process for each GPU, or one on a CPU; what is missing is installed and fetched first.
#
#   bash launch/local.sh [options of training]    such as --epochs 5 --lr 0.05 --run-dir runs/mine
#
# All options of training: .venv/bin/dist-mnist train --help   (once this script has run)
#
# The data: --data-dir or --dataset, else DIST_MNIST_DATA, else data/ in the repository, else MNIST is downloaded into
# it, else (no mirror answers) digits are generated. Runs go to runs/ in the repository.
#
# What you may adapt, by setting variables:
#   DIST_MNIST_DATA       a folder of idx files, or one that holds such folders, named like the data sets
#   DIST_MNIST_VENV       where to install (default: .venv in the repository); for more see launch/setup.sh
#   CUDA_VISIBLE_DEVICES  the GPUs to use, such as 0,1 (default: all)

set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
options=() previous="" data_chosen=${DIST_MNIST_DATA:+yes}

for option in "$@"; do
    case $option in
        -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
        --data-dir | --data-dir=* | --dataset | --dataset=*) data_chosen=yes ;;
    esac
    case "$previous $option" in # paths are meant from where the user stands; the training runs in the repository
        *' --data-dir='[!/]* | *' --run-dir='[!/]* | *' --config='[!/]* | *' --init='[!/]* | *' --model='[!/]*.py:*)
            option=${option%%=*}=$PWD/${option#*=} ;;
        '--data-dir '[!/-]* | '--run-dir '[!/-]* | '--config '[!/-]* | '--init '[!/-]* | '--model '[!/-]*.py:*)
            option=$PWD/$option ;;
    esac
    options+=("$option") previous=$option
done
case ${DIST_MNIST_DATA:-} in
    '') unset DIST_MNIST_DATA ;;
    [!/]*) export DIST_MNIST_DATA=$PWD/$DIST_MNIST_DATA ;;
esac

python=$(bash "$root/launch/setup.sh")
dist_mnist=${python%/*}/dist-mnist
cd "$root"

holds_a_set() { # whether one of the folders does, as the trainer sees it
    "$python" -c 'import pathlib, sys; from dist_mnist.data.sources.files import has_files
sys.exit(not any(has_files(pathlib.Path(folder)) for folder in sys.argv[1:]))' "$@"
}

if [[ -z $data_chosen ]] && ! holds_a_set data/mnist data; then
    echo "There is no data set in $root/data: downloading MNIST ..." >&2
    if ! "$dist_mnist" data get mnist >/dev/null; then
        echo "MNIST could not be had: no mirror answered. This run uses GENERATED digits instead (data/synthetic)." >&2
        echo "They look handwritten but are not MNIST, and its accuracy on them says nothing about MNIST." >&2
        echo "For MNIST, put its four files into $root/data/mnist, or give --data-dir." >&2
        options+=(--dataset synthetic)
    fi
fi
exec "$dist_mnist" train ${options[@]+"${options[@]}"}
