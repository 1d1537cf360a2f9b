"""CF-SFL, collaborative filtering with a synthetic feedback loop, made fast."""

from cfsfl_fast.config import CFSFLConfig
from cfsfl_fast.model import CFSFL

__version__ = "0.1.0"
__all__ = ["CFSFL", "CFSFLConfig", "__version__"]
