"""In an environment without extras: every public name is there, in less than a second beyond torch."""

import subprocess
import sys

SECONDS = 1.0
MEASURE = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def fastest(code: str) -> float:
    """Seconds of the best of five fresh processes."""
    command = [sys.executable, "-c", MEASURE.format(code)]
    return min(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(5))


torch, both = fastest("import torch"), fastest("import torch; from maskprop import *")
sys.stdout.write(f"torch {torch:.2f} s, maskprop {both - torch:.2f} s more\n")
sys.exit(both - torch > SECONDS)
