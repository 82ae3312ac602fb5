from __future__ import annotations

import logging
import sys

logger = logging.getLogger("ds_gradmix")
"""Shows INFO, which DeepSpeed's own logger hides, so that a user sees which rules are active."""

if not logger.handlers:
    _handler = logging.StreamHandler(sys.stderr)
    _handler.setFormatter(logging.Formatter("[%(asctime)s] [%(levelname)s] %(message)s"))
    logger.addHandler(_handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # or each line would be printed twice after a script's basicConfig
