"""Products of a warp, from registers, for programs that say what each of their threads does.

A tensor core's operands are spread over the threads of a warp. Here each thread loads its part itself, 16 bytes at a
time, with no shared memory between. A tensor of as many elements as a program has threads is a number of each.

Thread n of a warp is that of g = n // 4 and t = n % 4. Which 16 columns are multiplied together is the same for both
operands and nobody else's matter, so that the 8 that a thread has of 32 may lie side by side.
"""

import os

import triton
import triton.language as tl

if os.environ.get("TRITON_INTERPRET") == "1":

    @triton.jit
    def load16(place):
        """The 16 bytes from each place on, as four int32."""
        words = place.to(tl.pointer_type(tl.int32))
        return tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3)

    @triton.jit
    def load16_once(place):
        """The same of what no kernel of a step writes, and nobody reads again."""
        return load16(place)

    @triton.jit
    def packed(low, high, dtype: tl.constexpr):
        """Two float32 as one int32."""
        low, high = low.to(dtype).to(tl.uint16, bitcast=True), high.to(dtype).to(tl.uint16, bitcast=True)
        return ((high.to(tl.uint32) << 16) | low.to(tl.uint32)).to(tl.int32, bitcast=True)

    @triton.jit
    def _operand(first, second, dtype: tl.constexpr):
        """Of each warp 8 rows of an operand, by 16 columns."""
        a, b = halves(first, dtype)
        c, d = halves(second, dtype)
        return tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), [first.shape[0] // 32, 8, 16])

    @triton.jit
    def mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, dtype: tl.constexpr):
        """Add to c the product of 16 rows of a and 8 of b: of (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1).

        a: columns of row g, of row g + 8, and more of both; b: columns of row g, and more of it. c: float32.
        """
        b = _operand(b0, b1, dtype)[:, None, :, :]
        upper = tl.sum(_operand(a0, a2, dtype)[:, :, None, :] * b, 3)
        lower = tl.sum(_operand(a1, a3, dtype)[:, :, None, :] * b, 3)
        d0, d1 = tl.split(tl.reshape(upper, [a0.shape[0], 2]))
        d2, d3 = tl.split(tl.reshape(lower, [a0.shape[0], 2]))
        return c0 + d0, c1 + d1, c2 + d2, c3 + d3

else:

    @triton.jit
    def _load16(place, how: tl.constexpr):
        return tl.inline_asm_elementwise(
            "ld.global" + how + ".v4.b32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,l",
            [place],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def load16(place):
        """The 16 bytes from each place on, as four int32."""
        return _load16(place, "")

    @triton.jit
    def load16_once(place):
        """The same of what no kernel of a step writes, and nobody reads again."""
        # not as constant, which the assembler would load only when it is used
        return _load16(place, ".L1::no_allocate.L2::128B")

    @triton.jit
    def packed(low, high, dtype: tl.constexpr):
        """Two float32 as one int32."""
        kind: tl.constexpr = "bf16x2" if dtype == tl.bfloat16 else "f16x2"
        return tl.inline_asm_elementwise(
            "cvt.rn." + kind + ".f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )

    @triton.jit
    def mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, dtype: tl.constexpr):
        """Add to c the product of 16 rows of a and 8 of b: of (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1).

        a: columns of row g, of row g + 8, and more of both; b: columns of row g, and more of it. c: float32.
        """
        kind: tl.constexpr = "bf16.bf16" if dtype == tl.bfloat16 else "f16.f16"
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32." + kind + ".f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )


@triton.jit
def halves(word, dtype: tl.constexpr):
    """The two numbers of an int32, as float32."""
    if dtype == tl.bfloat16:
        low, high = (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
    else:
        low = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def numbers(place):
    """The 8 numbers from each place on, as float32."""
    words, found = load16(place), ()
    if place.dtype.element_ty == tl.float32:
        words += load16(place + 4)
        for n in tl.static_range(8):
            found += (words[n].to(tl.float32, bitcast=True),)
    else:
        for n in tl.static_range(4):
            found += halves(words[n], place.dtype.element_ty)
    return found
