"""How much each coordinate counts. To add a rule, write its file and name it in `RULES`."""

from ds_gradmix.scaling.rule import Scaling, Signal
from ds_gradmix.scaling.vrgd import VRGD

RULES: tuple[type[Scaling], ...] = (VRGD,)

__all__ = ["RULES", "VRGD", "Scaling", "Signal"]
