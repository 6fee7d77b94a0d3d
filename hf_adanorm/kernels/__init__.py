"""Fused kernels for LayerNorm-simple, AdaNorm and DetachNorm, one for the forward and one for the backward pass.

Importing this package puts them in front of the plain norms of `modeling_adanorm`, which remain the reference: `fused`
decides whether a kernel computes or declines, `cpu` serves CPUs, and `triton.enable()` adds GPUs.
"""

from hf_adanorm.modeling_adanorm import KERNELS

from . import cpu, fused

fused.BACKENDS["cpu"] = cpu
KERNELS.update({name: [fused.run] for name in fused.ARGUMENTS})
