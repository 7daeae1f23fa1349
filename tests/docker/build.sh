#!/usr/bin/env bash
# Build the images and use them as people do: bash tests/docker/build.sh [--full]
#
# Where a Docker engine answers, it builds docker/Dockerfile.cpu over the real base: 6 GB, some minutes.
#
# Elsewhere podman does, which is installed if missing (root on Debian or Ubuntu), over stand-ins for the base images
# made of Debian's packages: no image registry is asked. Every instruction of both Dockerfiles is carried out, and
# containers are started from what comes out. The packages of .venv are lent to them, mounted: all to the CPU image,
# so that pip has little to download, and torch with CUDA's libraries to the other, for which uv downloads the rest.
# --full builds the CPU image alone and lends it nothing.
#
# What podman over stand-ins does not prove: what NVIDIA's image holds (stubs take the place of Transformer Engine,
# apex and flash-attention), anything on a GPU, and that Docker's builder agrees with podman's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
full=${1:-}
work=$(mktemp -d)
engine=(docker)

say() { echo "== $* ($SECONDS s)"; }

fail() {
    echo "tests/docker/build.sh: $*" >&2
    exit 1
}

clean() {
    if [ "${engine[0]}" = podman ]; then
        "${engine[@]}" rmi --all --force >/dev/null 2>&1 || true
        umount "$work/images/overlay" 2>/dev/null || true  # podman mounts it upon itself
    fi
    rm -rf "$work"
}
trap clean EXIT

# Podman, with images in a folder of its own, and Debian as a stand-in for the base images.
set_up_podman() {
    local tools=(podman buildah runc mmdebstrap) missing=() tool
    for tool in "${tools[@]}"; do
        command -v "$tool" >/dev/null || missing+=("$tool")
    done
    if [ ${#missing[@]} -gt 0 ]; then
        say "install ${missing[*]}"
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >/dev/null 2>&1 ||
            fail "cannot install ${missing[*]}: install them, or start a Docker engine"
    fi
    # Not more files and processes than this shell may have itself, which is what podman would ask for.
    engine=(podman --root "$work/images" --runroot "$work/running" --storage-driver overlay --runtime runc
        --cgroup-manager cgroupfs)
    run=("${engine[@]}" run --network none --ulimit "nofile=$(ulimit -n):$(ulimit -n)" --ulimit nproc=4096:4096)

    local cache=${XDG_CACHE_HOME:-$HOME/.cache}/mmcore-stand-in.tar
    if [ ! -e "$cache" ]; then
        say "Debian's packages as a base image"
        mkdir -p "$(dirname "$cache")"
        # As the slim images are: no manual pages, whose missing folders have broken Java's installation before.
        mmdebstrap --quiet --variant=apt --include=python3,python3-pip,python3-venv,ca-certificates \
            --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
            bookworm "$cache.part.tar" || fail "mmdebstrap could not make a base image"
        mv "$cache.part.tar" "$cache"
    fi
    "${engine[@]}" import "$cache" debian >/dev/null 2>&1
}

# Debian as the slim image of Python. How this machine reaches the package index is the machine's affair: its
# certificates go along.
stand_in_for_python() {
    mkdir "$work/python"
    cp -L /etc/ssl/certs/ca-certificates.crt "$work/python/"
    cat >"$work/python/Containerfile" <<STEPS
FROM debian
COPY ca-certificates.crt /etc/ssl/certs/
RUN ln -s /usr/bin/python3 /usr/local/bin/python && ln -s /usr/bin/python3 /usr/local/bin/python3
ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
${lent:+ENV PYTHONPATH=/links/all}
STEPS
    build "$work/python" docker.io/library/python:3.11-slim-bookworm
}

# NVIDIA's image, as far as docs and Dockerfiles of others tell of it: torch outside any environment, a list of
# versions that pip obeys, a user of number 1000, and modules that cannot be had here, as stubs: see above.
stand_in_for_ngc() {
    mkdir "$work/ngc"
    cat >"$work/ngc/Containerfile" <<'STEPS'
FROM docker.io/library/python:3.11-slim-bookworm
RUN printf '/links/%s\n' torch stubs >/usr/local/lib/python3.11/dist-packages/lent.pth \
    && mkdir /etc/pip && echo numpy==1.26.4 >/etc/pip/constraint.txt \
    && useradd --uid 1000 --create-home ubuntu
ENV PIP_CONSTRAINT=/etc/pip/constraint.txt PYTHONPATH=
STEPS
    build "$work/ngc" nvcr.io/nvidia/pytorch:26.02-py3
    mkdir -p "$work"/lent/stubs/{apex,flash_attn,transformer_engine}
    touch "$work"/lent/stubs/{apex,flash_attn}/__init__.py
    cp tests/docker/transformer_engine_stub.py "$work/lent/stubs/transformer_engine/__init__.py"
}

build() { # CONTEXT IMAGE OPTION...: with podman, or with Docker
    local options=()
    if [ "${engine[0]}" = podman ]; then
        options=(--isolation chroot --network host --pull=never --layers=false)
    fi
    "${engine[@]}" build "${options[@]}" --tag "$2" "${@:3}" "$1" >"$work/build.log" 2>&1 ||
        fail "$2 was not built:"$'\n'"$(tail -n 30 "$work/build.log")"
}

# Packages of .venv to mount, and folders of links to them: all but mmcore, and what NVIDIA's image brings, which is
# torch, torchvision and what these two want.
lend() {
    local site name
    site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    [[ $site == */python3.11/* ]] || fail ".venv is not of Python 3.11, as Debian's is: give --full"
    mkdir -p "$work/lent/all" "$work/lent/torch"
    for name in "$site"/*; do
        name=${name##*/}
        case $name in
            mmcore* | __editable__* | pip | pip-*) continue ;;
            torch | torch-* | torchgen | functorch | torchvision* | triton | triton-* | nvidia | nvidia_* | cuda* | \
                sympy* | mpmath* | networkx*)
                ln -s "/lent/$name" "$work/lent/torch/"
                ;;
        esac
        ln -s "/lent/$name" "$work/lent/all/"
    done
    lent=(--volume "$site:/lent:ro" --volume "$work/lent:/links:ro")
    run+=("${lent[@]}")
}

check() { # IMAGE: what its containers say, give back, may do and are
    local said code=0
    say "use $1"
    "${run[@]}" --rm "$1" --help | grep '^usage: mmcore VERB' >/dev/null || fail "no usage from $1"
    # Versions and GPUs are on stderr, once a job; stdout is the verb's.
    "${run[@]}" --rm "$1" train quickstart_sft --print-config >"$work/config.yaml" 2>"$work/said"
    head -n 1 "$work/config.yaml" | grep -q '^[a-z]*:$' || fail "stdout is not YAML: $(head -n 1 "$work/config.yaml")"
    grep -Eq '^mmcore 0.1.0, torch 2.11.0.*, megatron-core 0.16.1, .*Python 3' "$work/said" || fail "$(cat "$work/said")"
    grep -q '^no GPU' "$work/said" || fail "nothing said of GPUs: $(cat "$work/said")"
    said=$("${run[@]}" --rm --env RANK=1 "$1" python -c 'print("alone")' 2>&1)
    [ "$said" = alone ] || fail "a second rank says more than it is asked for: $said"
    "${run[@]}" --rm "$1" trian >/dev/null 2>&1 || code=$?
    [ "$code" = 2 ] || fail "wrong usage ended with $code"
    # The command has the entrypoint's place, and is not root.
    said=$("${run[@]}" --rm "$1" python -c 'import os; print(os.getpid(), os.getuid(), os.getgid())' 2>/dev/null)
    [ "$said" = "1 1000 1000" ] || fail "process, user and group: $said"
    "${run[@]}" --rm "$1" bash -c '! touch /opt/venv/x && ! touch /opt/mmcore/x && touch ~/x /workspace/x' 2>/dev/null ||
        fail "the user may write what is not its own, or may not write what is"
    "${run[@]}" --rm --user 4321:4321 "$1" python -c 'import getpass, pathlib; pathlib.Path.home().joinpath(getpass.getuser()).touch()' 2>/dev/null ||
        fail "another user has no home or no name"
    "${run[@]}" --rm "$1" python /opt/mmcore/tools/converters/clip.py --help >/dev/null 2>&1 || fail "no converter"

    say "train in $1"
    rm -rf "$work/host" && mkdir -m 1777 "$work/host"
    .venv/bin/python -c 'import sys; from pathlib import Path; from mmcore.models.architecture import save_architecture
from tests import tiny; save_architecture(tiny.architecture(), Path(sys.argv[1]))' "$work/host"
    "${run[@]}" --rm --env OMP_NUM_THREADS=1 --volume "$work/host:/workspace" "$1" \
        python -m torch.distributed.run --standalone --nproc-per-node 2 -m mmcore train quickstart_sft \
        --model.checkpoint . --model.weights random --data.synthetic --data.seq-length 128 --train.steps 2 \
        --parallel.tensor-model-parallel-size 2 --optimizer.lr-warmup-steps 1 --checkpoint.save-interval 0 \
        --checkpoint.save run >"$work/run.log" 2>&1 ||
        fail "two ranks did not train:"$'\n'"$(tail -n 60 "$work/run.log")"
    [ "$(wc -l <"$work/host/run/log.jsonl")" = 2 ] || fail "the run's log: $(cat "$work/host/run/log.jsonl")"

    say "end $1 by a signal"
    "${run[@]}" --detach --name signalled "$1" python -c 'import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print("ready", flush=True); time.sleep(60)' >/dev/null
    for _ in $(seq 100); do
        "${engine[@]}" logs signalled 2>&1 | grep ready >/dev/null && break
        sleep 0.1
    done
    "${engine[@]}" kill --signal TERM signalled >/dev/null
    code=$("${engine[@]}" wait signalled)
    "${engine[@]}" rm signalled >/dev/null
    [ "$code" = 75 ] || fail "SIGTERM did not reach the command: exit code $code"
}

if docker info >/dev/null 2>&1; then
    run=(docker run --network none)
    say "build docker/Dockerfile.cpu"
    build . mmcore-cpu --file docker/Dockerfile.cpu
    check mmcore-cpu
    exit
fi
set_up_podman
lent=()
if [ "$full" = --full ]; then
    stand_in_for_python
    say "build docker/Dockerfile.cpu, torch and all"
    build . mmcore-cpu --file docker/Dockerfile.cpu
    check mmcore-cpu
    exit
fi
lend
stand_in_for_python
stand_in_for_ngc
say "build docker/Dockerfile.cpu"
build . mmcore-cpu --file docker/Dockerfile.cpu "${lent[@]}"
check mmcore-cpu
say "build Dockerfile over a stand-in for NVIDIA's image"
build . mmcore --file Dockerfile "${lent[@]}"
rm -r "$work/lent/stubs"  # they can be imported, not used
check mmcore
say "all is well"
