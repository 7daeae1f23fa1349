"""Whether a comparison with the original fits into this machine's memory: asked before hours are spent."""

from pathlib import Path

MEMINFO = Path("/proc/meminfo")

# The original and ours are in memory one after the other, in fp32. Ours takes more while it is loaded:
# megatron-core joins gate and up of all layers in a second copy.
BYTES_PER_PARAMETER, REST = 6.5, 2e9


def check_memory(num_parameters: int) -> None:
    """Raise a ValueError if a model of this size does not fit; where the machine does not tell, all do."""
    if not MEMINFO.is_file():
        return
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines() if ":" in line)
    available = int(lines["MemAvailable"].split()[0]) * 1024
    needed = num_parameters * BYTES_PER_PARAMETER + REST
    if needed > available:
        raise ValueError(
            f"comparing a model of {num_parameters / 1e9:.2f} billion parameters in fp32 takes {needed / 1e9:.0f} GB "
            f"of memory and {available / 1e9:.0f} GB are free: run verify.py on a larger machine, or convert without "
            "--verify"
        )
