"""CF-SFL, collaborative filtering with a synthetic feedback loop, made fast."""

from typing import TYPE_CHECKING, Any

from cfsfl_fast.config import CFSFLConfig
from cfsfl_fast.model import CFSFL

if TYPE_CHECKING:
    from cfsfl_fast.estimator import CFSFLRecommender

__version__ = "0.1.0"
__all__ = ["CFSFL", "CFSFLConfig", "CFSFLRecommender", "__version__"]


def __getattr__(name: str) -> Any:
    """CFSFLRecommender when it is asked for: the model alone needs neither data sets nor training."""
    if name == "CFSFLRecommender":
        from cfsfl_fast.estimator import CFSFLRecommender

        return CFSFLRecommender
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
