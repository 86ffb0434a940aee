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
    if WEIGHTS > 1:
        tiles = tl.cdiv(size, BO)
        if tile >= tiles:
            tile -= tiles
            out += size
            weight = weight1
            size = size1
            if WEIGHTS > 2:
                tiles = tl.cdiv(size1, BO)
                if tile >= tiles:
                    tile -= tiles
                    out += size1
                    weight = weight2
                    size = size2
                    if WEIGHTS > 3:
                        tiles = tl.cdiv(size2, BO)
                        if tile >= tiles:
                            tile -= tiles
                            out += size2
                            weight = weight3
                            size = size3
    return tile, out, weight, size
