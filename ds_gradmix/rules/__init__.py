"""The rules, and all that the author of one needs: the bases, `RngKey`, `MixingDecision` and `RuleCost`."""

from ds_gradmix.costs.model import RuleCost as RuleCost
from ds_gradmix.ops.segments import to_device as to_device
from ds_gradmix.ops.segments import weighted_sum as weighted_sum
from ds_gradmix.rules.base import Extrapolation as Extrapolation
from ds_gradmix.rules.base import GradientFreeMixing as GradientFreeMixing
from ds_gradmix.rules.base import GramianMixing as GramianMixing
from ds_gradmix.rules.base import Mixing as Mixing
from ds_gradmix.rules.base import NormMixing as NormMixing
from ds_gradmix.rules.base import RngKey as RngKey
from ds_gradmix.rules.base import Rule as Rule
from ds_gradmix.rules.base import Scaling as Scaling
from ds_gradmix.rules.base import WrongParam as WrongParam
from ds_gradmix.rules.decision import Considered as Considered
from ds_gradmix.rules.decision import MixingDecision as MixingDecision
from ds_gradmix.rules.extrapolation.noise import Noise as Noise
from ds_gradmix.rules.extrapolation.pastgradient import PastGradient as PastGradient
from ds_gradmix.rules.mixing.adacons import AdaCons as AdaCons
from ds_gradmix.rules.mixing.adasum import Adasum as Adasum
from ds_gradmix.rules.mixing.gaf import GAF as GAF
from ds_gradmix.rules.mixing.geometricmedian import GeometricMedian as GeometricMedian
from ds_gradmix.rules.mixing.gradientmix import GradientMix as GradientMix
from ds_gradmix.rules.mixing.guard import Guard as Guard
from ds_gradmix.rules.mixing.krum import Krum as Krum
from ds_gradmix.rules.mixing.mean import Mean as Mean
from ds_gradmix.rules.mixing.multikrum import MultiKrum as MultiKrum
from ds_gradmix.rules.mixing.normclip import NormClip as NormClip
from ds_gradmix.rules.mixing.torchjd import TorchJD as TorchJD
from ds_gradmix.rules.scaling.andmask import AndMask as AndMask
from ds_gradmix.rules.scaling.vrgd import VRGD as VRGD

MIXING: tuple[type[Mixing], ...] = (
    AdaCons,
    Adasum,
    GAF,
    GeometricMedian,
    GradientMix,
    Guard,
    Krum,
    Mean,
    MultiKrum,
    NormClip,
    TorchJD,
)
SCALING: tuple[type[Scaling], ...] = (AndMask, VRGD)
EXTRAPOLATION: tuple[type[Extrapolation], ...] = (Noise, PastGradient)
