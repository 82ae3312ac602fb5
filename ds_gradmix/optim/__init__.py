"""Optimizers with a trust ratio for every parameter, also where ZeRO steps on flat partitions of several."""

from ds_gradmix.optim.lamb import Lamb as Lamb
from ds_gradmix.optim.lars import Lars as Lars
