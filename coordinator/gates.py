"""Gates: what an update must pass before it counts. Here, their arithmetic.

It runs on each frame as it comes, so that an update is judged without being read again: the sums over its frames give the
norm of its delta.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def delta_sum_squares(
    local: NDArray[np.float32], global_: NDArray[np.float32], scratch: NDArray[np.float64] | None = None
) -> float:
    """The sum of `(local - global)^2` over a frame, in float64; infinite or NaN if any local element is.

    So the gate for finite values costs nothing beyond the one for the norm: `math.isfinite` of the sum over frames decides
    both. No finite float32 overflows here: (2 * 3.4e38)^2 is 4.6e77 an element, and float64 reaches to 1.8e308.

    Args:
        local: float32[n], what the agent has after training, as it came.
        global_: float32[n], the same elements of the model that it was trained on; finite.
        scratch: float64[at least n], overwritten; kept by the caller, it saves an allocation a frame.
    """
    if local.shape != global_.shape:
        raise ValueError(f"local {local.shape} and global {global_.shape}: expected the same elements of both")
    delta = np.empty(local.shape, np.float64) if scratch is None else scratch[: len(local)]
    with np.errstate(all="ignore"):  # a peer's NaN is a result, not a warning
        np.copyto(delta, local)
        np.subtract(delta, global_, out=delta)
        np.multiply(delta, delta, out=delta)
        # Not np.dot: how BLAS splits a sum depends on its number of threads, and with it the last bits.
        return float(np.add.reduce(delta))
