"""Hand-written Triton kernels; importing this package needs Triton, using it a CUDA device."""

from __future__ import annotations

raise ImportError("the Triton kernels are not part of this build")
