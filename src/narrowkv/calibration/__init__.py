"""What is learned offline: streaming statistics, the codebook fit, and the file it is stored in."""

from narrowkv.calibration.calibration import Calibration
from narrowkv.calibration.fingerprint import Fingerprint
from narrowkv.calibration.fit import Fit

__all__ = ["Calibration", "Fingerprint", "Fit"]
