"""Fused kernels for LayerNorm-simple, AdaNorm and DetachNorm, one for the forward and one for the backward pass.

`register` puts them in front of the plain norms of `modeling_adanorm`, which remain the reference: `fused` decides
whether a kernel computes or declines, `cpu` serves CPUs, and `triton.enable()` adds GPUs.
"""

from hf_adanorm.modeling_adanorm import KERNELS

from . import cpu, fused


def register() -> None:
    """Put the kernels in front of the plain norms; a second call changes nothing."""
    fused.BACKENDS["cpu"] = cpu
    for name in fused.ARGUMENTS:
        KERNELS[name] = [fused.run]
