#!/usr/bin/env bash
# Run dist-mnist in a container image by Apptainer or Singularity, as slurm/*.sh do where DIST_MNIST_IMAGE is set.
#
#   DIST_MNIST_IMAGE=dist-mnist.sif bash launch/in_image.sh train [options of training]
#
# It has the GPUs and the variables of this machine, and what Apptainer mounts by itself: the home and this folder.
#
# What you may adapt, by setting variables:
#   DIST_MNIST_IMAGE  the image: a .sif file (made with launch/apptainer.def), or a name such as docker://HOST/NAME
#   APPTAINER_BIND    other folders that the image is to have, such as /scratch (Singularity: SINGULARITY_BIND)
#   DIST_MNIST_DATA   where the data is; the image has this folder, too
set -euo pipefail

fail() { printf 'error: %s\n' "$*" >&2 && exit 2; }

case ${1:-} in
    -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
esac
[[ -n ${DIST_MNIST_IMAGE:-} ]] || fail "DIST_MNIST_IMAGE names no image; see --help"
runtime=$(command -v apptainer || command -v singularity) ||
    fail "DIST_MNIST_IMAGE is set, and neither apptainer nor singularity is installed on $HOSTNAME"
options=()
bind() {
    [[ $1 != *[:,]* ]] || fail "$1 cannot be mounted into the image: the path has a colon or comma; use another folder"
    options+=(--bind "$1")
}
bind "$PWD"
[[ -z ${DIST_MNIST_DATA:-} ]] || bind "$(realpath -m -- "$DIST_MNIST_DATA")"
[[ ! -e /dev/nvidiactl ]] || options+=(--nv)
unset PYTHONPATH PYTHONHOME # of this machine's Python
exec "$runtime" exec "${options[@]}" "$DIST_MNIST_IMAGE" dist-mnist "$@"
