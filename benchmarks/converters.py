"""How fast and in how much memory a full-size Mistral-7B goes through the converters, in both directions.

`python benchmarks/converters.py --folder /some/empty/folder`

Writes synthetic weights of Mistral-7B-v0.3's shapes (14.5 GB in bf16, three shards), then measures,
each from a cold page cache where the kernel lets us drop it:

1. copying these files on the same disk (written through to it, as the converters do), and hashing them,
2. `mistral.py`: Hugging Face -> checkpoint (which hashes its source as well),
3. copying the checkpoint, and hashing it,
4. `export_hf.py`: checkpoint -> Hugging Face,

and compares every tensor that came back with its source, bit for bit. Prints one table of ratios and
one line of JSON. Needs room for three times the weights: 44 GB.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mmcore.models.architecture import LanguageArch
from mmcore.models.presets import LANGUAGE

CONVERTERS = Path(__file__).parents[1] / "tools" / "converters"
BLOCK = 1 << 24


def shapes(arch: LanguageArch) -> dict[str, tuple[int, ...]]:
    """Tensors of a Hugging Face folder."""
    h, f, v = arch.hidden_size, arch.ffn_hidden_size, arch.vocab_size
    kv = arch.num_query_groups * arch.kv_channels
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h)}
    for layer in range(arch.num_layers):
        block = f"model.layers.{layer}."
        found |= {f"{block}{name}.weight": (h,) for name in ("input_layernorm", "post_attention_layernorm")}
        found |= {f"{block}self_attn.{name}_proj.weight": (h, h) for name in "qo"}
        found |= {f"{block}self_attn.{name}_proj.weight": (kv, h) for name in "kv"}
        found |= {f"{block}mlp.{name}_proj.weight": (f, h) for name in ("gate", "up")}
        found[f"{block}mlp.down_proj.weight"] = (h, f)
    return found | {"model.norm.weight": (h,), "lm_head.weight": (v, h)}


def write_source(folder: Path, arch: LanguageArch, shard_bytes: float = 5e9) -> None:
    """A Hugging Face folder of random bits, in shards."""
    folder.mkdir(parents=True)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes(arch).items():
        count = 2 * torch.Size(shape).numel()
        if size + count > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += count
    generator = torch.Generator().manual_seed(0)
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: _random(shape, generator) for name, shape in shard.items()}, folder / file)
        places |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = {
        "model_type": "mistral",
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn_hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.num_query_groups,
        "head_dim": arch.kv_channels,
        "vocab_size": arch.vocab_size,
        "max_position_embeddings": arch.max_position_embeddings,
        "rope_theta": arch.rotary_base,
        "rms_norm_eps": arch.layernorm_epsilon,
        "sliding_window": None,
    }
    (folder / "config.json").write_text(json.dumps(config))


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    bits = torch.empty(shape, dtype=torch.int16).random_(-(1 << 15), 1 << 15, generator=generator)
    return bits.view(torch.bfloat16)


def drop_caches() -> bool:
    """Forget what files are in memory, where the kernel lets us."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def copied(source: Path, target: Path) -> None:
    """Copy by reading and writing, as no clone of the file system's would be a fair race."""
    target.mkdir()
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        with path.open("rb") as read, (target / path.name).open("wb") as write:
            while block := read.read(BLOCK):
                write.write(block)
            write.flush()
            os.fsync(write.fileno())


def hashed(source: Path) -> None:
    """SHA-256 of every file."""
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)


def seconds(work: Callable[..., Any], *arguments: Any) -> float:
    drop_caches()
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def converter(name: str, source: Path, target: Path) -> tuple[float, float]:
    """Run a converter in a process of its own: seconds, and the most memory it held, in GB."""
    drop_caches()
    command = [sys.executable, str(CONVERTERS / name), "--input", str(source), "--output", str(target)]
    start = time.perf_counter()
    process = subprocess.Popen(command)
    peak = 0
    while process.poll() is None:
        # The kernel's own high-water mark. What wait4 tells would include this process before it became that one.
        peak = max(peak, _high_water_mark(process.pid))
        time.sleep(0.1)
    taken = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"{name} failed")
    return taken, peak / 1e9


def _high_water_mark(pid: int) -> int:
    """Most resident memory that a process ever had, mapped files included, in bytes; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def read_back(folder: Path, name: str) -> torch.Tensor:
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(folder / places[name], "pt") as file:
        return file.get_tensor(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="empty folder on the disk to measure")
    parser.add_argument("--layers", type=int, default=32, help="fewer for a trial")
    options = parser.parse_args()
    arch = replace(LANGUAGE["mistral_7b_v03"], num_layers=options.layers)
    folder: Path = options.folder
    source, checkpoint, back, copy = (folder / name for name in ("source", "checkpoint", "back", "copy"))
    write_source(source, arch, 5e9 if options.layers == 32 else 1e9)
    is_cold = drop_caches()
    result: dict[str, Any] = {}
    for direction, name, origin, target in (
        ("import", "mistral.py", source, checkpoint),
        ("export", "export_hf.py", checkpoint, back),
    ):
        copying = seconds(copied, origin, copy)
        shutil.rmtree(copy)
        hashing = seconds(hashed, origin)
        taken, memory = converter(name, origin, target)
        result[direction] = {
            "copy_s": round(copying, 1),
            "hash_s": round(hashing, 1),
            "convert_s": round(taken, 1),
            "ratio": round(taken / (copying + hashing), 2),
            "peak_memory_gb": round(memory, 2),
        }
    wrong = [
        name
        for name in shapes(arch)
        if not torch.equal(read_back(source, name).view(torch.int16), read_back(back, name).view(torch.int16))
    ]
    if wrong:
        sys.exit(f"these tensors came back different: {', '.join(wrong)}")
    print(f"{'':8}{'copy':>8}{'hash':>8}{'convert':>9}{'ratio':>7}{'memory':>10}")
    for direction, row in result.items():
        print(
            f"{direction:8}{row['copy_s']:7.1f}s{row['hash_s']:7.1f}s{row['convert_s']:8.1f}s{row['ratio']:7.2f}"
            f"{row['peak_memory_gb']:7.2f} GB"
        )
    gigabytes = sum(path.stat().st_size for path in source.iterdir()) / 1e9
    machine = {"cpu": _cpu(), "cores": os.cpu_count(), "cold_cache": is_cold}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    print(json.dumps({"gigabytes": round(gigabytes, 1), **result, **machine, **versions, "identical": True}))


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
