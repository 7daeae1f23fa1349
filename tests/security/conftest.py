import sys
from pathlib import Path

CONVERTERS = Path(__file__).parents[2] / "tools" / "converters"
sys.path.insert(0, str(CONVERTERS))  # where Python puts it when a converter runs as a script
