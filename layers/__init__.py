"""Bijectors of m x m patches. A new one needs one entry here; flags and tests find it.

The contract: a constructor with the arguments of `RNVP`; `forward(x)` and `inverse(y)` take patches (N, C, m, m) and
return patches of the same shape and log_det (N,), the log-determinant of this direction; untrained, both are the
identity. `inverse_passes` is how many evaluations of its networks an inverse takes. The networks are `Networks`
(networks.py), whose `run` brings compiled kernels, bfloat16 and recomputation.
"""

from .autoregressive import Autoregressive
from .coupling import RNVP
from .spline import Spline
from .spline_lu import SplineLU

PATCH_BIJECTORS = {"rnvp": RNVP, "ar": Autoregressive, "spline": Spline, "spline_lu": SplineLU}
