#!/usr/bin/env bash
# Train on this machine, with one process per GPU, or one on a CPU. Installs the package and downloads MNIST if needed.
#
#   bash launch/local.sh [training options]    such as --epochs 5 --lr 0.05 --run-dir runs/mine
#
# All training options: .venv/bin/dist-mnist train --help   (after this script has run once)
#
# Data comes from --data-dir or --dataset, else DIST_MNIST_DATA, else data/ in the repository. If that has none, MNIST
# is downloaded to it; if no mirror answers, digits are generated. Runs are written to runs/ in the repository.
#
# What you may adapt, by environment variables:
#   DIST_MNIST_DATA       folder of idx files, or of sub-folders of them, named after datasets
#   DIST_MNIST_VENV       virtual environment (default: .venv in the repository); more in launch/setup.sh
#   CUDA_VISIBLE_DEVICES  GPUs to use, such as 0,1 (default: all)

set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
options=() previous="" data_chosen=${DIST_MNIST_DATA:+yes}

for option in "$@"; do
    case $option in
        -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
        --data-dir | --data-dir=* | --dataset | --dataset=*) data_chosen=yes ;;
    esac
    case "$previous $option" in # paths are relative to the user's working directory; training runs in the repository
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

has_dataset() { # whether one of the folders has a complete dataset, by the trainer's rules
    "$python" -c 'import pathlib, sys; from dist_mnist.data.sources.files import has_files
sys.exit(not any(has_files(pathlib.Path(folder)) for folder in sys.argv[1:]))' "$@"
}

if [[ -z $data_chosen ]] && ! has_dataset data/mnist data; then
    echo "No dataset found in $root/data: downloading MNIST ..." >&2
    if ! "$dist_mnist" data get mnist >/dev/null; then
        echo "Downloading MNIST failed: no mirror answered. Training on GENERATED digits instead (data/synthetic)." >&2
        echo "They resemble handwriting but are not MNIST: accuracy on them says nothing about MNIST." >&2
        echo "To train on MNIST, put its four files into $root/data/mnist, or give --data-dir." >&2
        options+=(--dataset synthetic)
    fi
fi
exec "$dist_mnist" train ${options[@]+"${options[@]}"}
