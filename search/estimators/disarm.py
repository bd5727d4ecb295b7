"""DisARM: ARM with less variance."""

from __future__ import annotations

import numpy as np

from evoprune.search.estimators import ESTIMATORS, EstimatorPlugin
from evoprune.search.estimators.arm import Arm
from evoprune.search.policies import Floats, Mask
from evoprune.search.policies.shift import sigmoid


class DisArm(Arm):
    """Per pair (f(b) - f(b')) (-1)^b' 1{b != b'} s(|theta|) / 2: ARM averaged over all u that give the same pair.

    Source: Dong et al. 2020, arXiv:2006.10680.
    """

    def direction(self, odds: Floats, first: Mask, second: Mask, noise: Floats) -> Floats:
        found: Floats = (first.astype(np.float64) - second) * sigmoid(np.abs(odds)) / 2
        return found


ESTIMATORS.add("disarm", EstimatorPlugin("ARM, averaged over what gives the same pair", DisArm, independent=True))
