import logging
import sys

# It shows INFO, which DeepSpeed's own logger hides, so that a user sees which rules are active.
logger = logging.getLogger("ds_gradmix")
if not logger.handlers:
    _handler = logging.StreamHandler(sys.stderr)
    _handler.setFormatter(logging.Formatter("[%(asctime)s] [%(levelname)s] %(message)s"))
    logger.addHandler(_handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # or each line would be printed twice after a script's basicConfig
