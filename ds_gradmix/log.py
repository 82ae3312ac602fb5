from __future__ import annotations

import logging
import sys

logger = logging.getLogger("ds_gradmix")
"""Shown from INFO on, unlike DeepSpeed's, which hides what is not a warning: what is active must be seen."""

if not logger.handlers:
    _handler = logging.StreamHandler(sys.stderr)
    _handler.setFormatter(logging.Formatter("[%(asctime)s] [%(levelname)s] %(message)s"))
    logger.addHandler(_handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # or every line stands there twice once a script has called basicConfig
