#!/usr/bin/env bash
# Say what the container holds and which GPUs it sees, then become the command: one of mmcore's verbs with its
# options, or a program: torchrun, tensorboard, python, bash, or any by its path.
#
# All that is said goes to stderr, so that what a verb prints can be piped; of a job's ranks the first one speaks.
# The command takes this process's place (exec): signals reach it with nothing between. A process that an engine
# starts first ignores the signals it has no handler for; `docker run --init` (compose: init: true) cures that.
#
# bash, not sh: NVIDIA's images have it read a file (BASH_ENV) that finds the driver's compatibility libraries.
set -euo pipefail

if [ "${RANK:-${SLURM_PROCID:-0}}" = 0 ]; then
    {
        python /opt/mmcore/docker/versions.py || true
        if command -v nvidia-smi >/dev/null && gpus=$(nvidia-smi --query-gpu=index,name,memory.total,driver_version --format=csv,noheader 2>&1); then
            echo "${gpus:-no GPU}"
        else
            echo "no GPU${gpus:+ (nvidia-smi: $gpus)}"
        fi
    } >&2
fi

case ${1:-} in
    torchrun | tensorboard | python | bash | */*) exec "$@" ;;
    *) exec mmcore "$@" ;;
esac
