"""Programmatic dependent launch (sm_90 and newer): a kernel starts while the one before it in the stream still runs.

What hides behind that kernel's end is the start itself, addresses and the loads of weights. Everything else must come
after the wait, in every program, also in one that has nothing to do: the kernel after this one trusts that whatever
this one waited for has ended, too. `plan.DEPENDENT_LAUNCH` switches it.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_kernel_before(DEPENDENT: tl.constexpr):
    """From here on all that the kernels before this one have written can be read; the next one may start."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
