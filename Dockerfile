# mmcore on NVIDIA's PyTorch image, for training on GPUs:
#
#   docker build -t mmcore --build-arg NGC_DIGEST=sha256:... --build-arg REVISION="$(git rev-parse HEAD)" .
#   docker run --rm --init --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 \
#       -v "$PWD:/workspace" mmcore torchrun --nproc-per-node 8 -m mmcore train mistral_clip_sft ...
#
# The tag is the first whose torch is of the release that setup.py pins (26.02: 2.11.0a0+eb65b36914.nv26.02, CUDA 13.1,
# Python 3.12). A tag can be pushed again, a digest cannot. None is written here, since none could be looked up where
# this file was written: `docker buildx imagetools inspect nvcr.io/nvidia/pytorch:26.02-py3` prints it.
ARG NGC_TAG=26.02-py3
ARG NGC_DIGEST=

FROM nvcr.io/nvidia/pytorch:${NGC_TAG}${NGC_DIGEST:+@${NGC_DIGEST}} AS build
# torch, torchvision and what is compiled against them (Transformer Engine, apex, flash-attention, triton, CUDA's
# libraries) stay the image's; all else is ours, at our versions, in an environment over the image's Python. So does
# NVIDIA too (Megatron-LM, docker/Dockerfile.ci.dev at core_v0.16.1). The image's own list of versions, which pip
# obeys by this variable, holds for what is the image's.
ENV PIP_CONSTRAINT=
ARG UV_VERSION=0.13.9
RUN pip install --no-cache-dir --target /opt/uv "uv==${UV_VERSION}" \
    && /opt/uv/bin/uv venv --system-site-packages --python "$(command -v python3)" /opt/venv
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:/opt/uv/bin:$PATH
WORKDIR /src
# The dependencies are a layer of their own, which an edit of mmcore leaves alone: without mmcore/ beside it,
# setup.py describes a package of no modules. The build's own setuptools is the pinned one, too.
COPY constraints.txt setup.py ./
ARG EXTRAS=eval,serve
RUN printf '%s; sys_platform == "never"\n' torch torchvision >/tmp/image-has.txt \
    && uv pip install --no-cache --constraint constraints.txt setuptools \
    && uv pip install --no-cache --compile-bytecode --no-build-isolation \
        --constraint constraints.txt --override /tmp/image-has.txt ".[${EXTRAS}]"
COPY mmcore mmcore
RUN uv pip install --no-cache --compile-bytecode --no-build-isolation --no-deps --reinstall-package mmcore .

FROM nvcr.io/nvidia/pytorch:${NGC_TAG}${NGC_DIGEST:+@${NGC_DIGEST}}
# METEOR and the PTB tokenizer are Java programs, whose installation stops where an image has left out the folder of
# manual pages. Ubuntu keeps no old versions that could be pinned.
# hadolint ignore=DL3008
RUN mkdir -p /usr/share/man/man1 \
    && apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends default-jre-headless \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/venv /opt/venv
COPY LICENSE /opt/mmcore/
COPY docker/entrypoint.sh docker/versions.py /opt/mmcore/docker/
COPY examples /opt/mmcore/examples
COPY tools /opt/mmcore/tools
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PIP_CONSTRAINT=
# None of them wants a GPU or its driver to be imported.
RUN python /opt/mmcore/docker/versions.py torch torchvision transformer_engine.pytorch apex flash_attn \
    megatron.core megatron.energon open_clip transformers fastapi

# NVIDIA's image has a user of number 1000 already (Ubuntu's): the numbers need not be free.
# `--user "$(id -u):$(id -g)"` makes another user of it: a home that all may write, a name for those who ask for one.
ARG USER_ID=1000
ARG GROUP_ID=1000
RUN groupadd --non-unique --gid "${GROUP_ID}" mmcore \
    && useradd --non-unique --uid "${USER_ID}" --gid "${GROUP_ID}" --create-home --no-log-init mmcore \
    && chmod 1777 /home/mmcore \
    && install -d -o "${USER_ID}" -g "${GROUP_ID}" /workspace
ENV HOME=/home/mmcore USER=mmcore
USER ${USER_ID}:${GROUP_ID}
WORKDIR /workspace
# In place of NVIDIA's, whose banner would stand in what a verb prints.
ENTRYPOINT ["/opt/mmcore/docker/entrypoint.sh"]
CMD ["--help"]

ARG NGC_TAG
ARG NGC_DIGEST
ARG REVISION=
LABEL org.opencontainers.image.title="mmcore" \
    org.opencontainers.image.description="Vision-language pretraining and tuning on Megatron-Core" \
    org.opencontainers.image.version="0.1.0" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.base.name="nvcr.io/nvidia/pytorch:${NGC_TAG}" \
    org.opencontainers.image.base.digest="${NGC_DIGEST}"
