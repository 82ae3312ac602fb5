"""`python -m ds_gradmix SCRIPT ...`: any DeepSpeed script, unedited, with its config's gradmix block
honoured.
"""

from __future__ import annotations

import os
import sys

from ds_gradmix.cli import VERBS
from ds_gradmix.cli import main as verbs
from ds_gradmix.script import LOCAL_RANK, run_script

_USAGE = """usage: python -m ds_gradmix SCRIPT [its options]       (also: -m MODULE)
       deepspeed [launcher options] --module ds_gradmix SCRIPT [its options]
       ds_gradmix {verbs} ...
"""


def main(arguments: list[str]) -> None:
    """Start a script; a verb in its place is passed on to the command line."""
    plain = [argument for argument in arguments if not argument.startswith(LOCAL_RANK)]
    if not plain or plain[0] in ("-h", "--help"):
        sys.stderr.write(_USAGE.format(verbs="|".join(VERBS)))
        sys.exit(0 if plain else 2)
    if plain[0] in VERBS and not os.path.exists(plain[0]):
        sys.exit(verbs(plain))
    if plain[0] != "-m" and not os.path.isfile(plain[0]):
        sys.stderr.write(f"ds_gradmix: error: can't open script {plain[0]!r}: no such file\n")
        sys.exit(2)
    from ds_gradmix import enable
    from ds_gradmix.slurm import rank_environment

    os.environ.update(rank_environment(os.environ))
    enable()
    run_script(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
