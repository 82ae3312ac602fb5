"""Rules that give every coordinate a factor, one a file."""

from ds_gradmix.rules.scaling.vrgd import VRGD as VRGD
