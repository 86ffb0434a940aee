"""Which of several weights of one launch a program multiplies by."""

import triton
import triton.language as tl


@triton.jit
def whose(
    tile, out, weight, weight1, weight2, weight3, size, size1, size2, size3, WEIGHTS: tl.constexpr, BO: tl.constexpr
):
    """Of a program's tile of BO outputs: its number within a weight, where that's outputs begin, the weight, its size.

    The tiles of one weight come after those of another, their outputs lie side by side.
    """
    weights, sizes = (weight1, weight2, weight3), (size1, size2, size3)
    for n in tl.static_range(WEIGHTS - 1):
        tiles = tl.cdiv(size, BO)
        if tile >= tiles:  # false from the weight on that it is of
            tile -= tiles
            out += size
            weight = weights[n]
            size = sizes[n]
    return tile, out, weight, size
