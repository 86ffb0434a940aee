"""Many tokens of lightning attention, as those of Mamba-2: see `statecache.ops.lightning`."""

from torch import Tensor

from statecache.kernels import ssd_chunk


def chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alive: Tensor,
    slope: Tensor,
    state: Tensor | None = None,
    count: Tensor | None = None,
    at: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Take in T tokens, as `statecache.ops.lightning.chunk`: all in float32, whatever the inputs."""
    gate = alive.reshape(*v.shape[:2], 1).expand(v.shape[:3])
    return ssd_chunk.chunk(v, gate, -slope, k, q, state, count, at)
