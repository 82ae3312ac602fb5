"""A bench for studies: W workers in one process, any rule by `ds_gradmix.combine`, many seeds, paired.

tasks.py has what is learned, training.py one training run, studies.py which runs answer which question,
runner.py trains them, statistics.py compares them and document.py writes docs/evidence.md. `make evidence`.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
sys.path.insert(0, str(ROOT / "launch"))  # the quickstart's text, learning-rate schedule and faults
