"""Conversion of packed integers to floats in the registers of a Triton kernel.

A plane is the weights at one place of all bytes. With 8 bits per weight there is one plane; with 4 there are two, the
weights at even and at odd positions along the input. Products use one plane after the other, with the inputs at the
same positions, so no number has to move between threads.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from torch import Tensor

_BF16 = {"kind": "bf16x2", "one": "0x3F803F80", "exponent": "0x43"}  # 0x4300 is 128, its last bit counts 1
_FP16 = {"kind": "f16x2", "one": "0x3C003C00", "exponent": "0x64"}  # 0x6400 is 1024


def _ptx(first: str, offset: str, *, kind: str, one: str, exponent: str) -> tl.constexpr:
    """PTX that converts four bytes at once, `$2`, to four numbers, two in `$0` and two in `$1`.

    Each byte becomes the mantissa of a number whose last bit counts 1; then the excess is subtracted. Both steps are
    exact. Converting integers one by one would take longer than the memory.

    Args:
        first: instructions that make `bytes`, unsigned integers.
        offset: minus the excess, twice.
    """
    return tl.constexpr(
        f"""{{
        .reg .b32 bytes, one, offset, low, high;
        {first}
        mov.b32 one, {one};
        mov.b32 offset, {offset};
        prmt.b32 low, bytes, {exponent}, 0x4140;
        prmt.b32 high, bytes, {exponent}, 0x4342;
        fma.rn.{kind} $0, low, one, offset;
        fma.rn.{kind} $1, high, one, offset;
        }}"""
    )


_LOW = "and.b32 bytes, $2, 0x0F0F0F0F;"
_HIGH = "shr.u32 bytes, $2, 4; and.b32 bytes, bytes, 0x0F0F0F0F;"
_LOW_INT4_AS_BF16 = _ptx(_LOW, "0xC308C308", **_BF16)  # 128 + 8
_HIGH_INT4_AS_BF16 = _ptx(_HIGH, "0xC308C308", **_BF16)
_LOW_INT4_AS_FP16 = _ptx(_LOW, "0xE408E408", **_FP16)  # 1024 + 8
_HIGH_INT4_AS_FP16 = _ptx(_HIGH, "0xE408E408", **_FP16)
_INT8_AS_FP16 = _ptx("xor.b32 bytes, $2, 0x80808080;", "0xE480E480", **_FP16)  # 1024 + 128

# bfloat16 has seven bits of mantissa: 128 + the low seven bits of n, minus 128 or, for a negative n, 256
_INT8_AS_BF16 = tl.constexpr(
    """{
        .reg .b32 bits, signs, minus_one, low, high, low_signs, high_signs;
        and.b32 bits, $2, 0x7F7F7F7F;
        and.b32 signs, $2, 0x80808080;
        mov.b32 minus_one, 0xBF80BF80;
        prmt.b32 low, bits, 0x43, 0x4140;
        prmt.b32 high, bits, 0x43, 0x4342;
        prmt.b32 low_signs, signs, 0x43, 0x4140;
        prmt.b32 high_signs, signs, 0x43, 0x4342;
        fma.rn.bf16x2 $0, low_signs, minus_one, low;
        fma.rn.bf16x2 $1, high_signs, minus_one, high;
        }"""
)


@triton.jit
def integers_of_plane(packed, PLANE: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr, USE_PTX: tl.constexpr):
    """The integers of one plane in `dtype`, exactly.

    Args:
        packed: int8 for 8 bits. For 4 bits uint8, with two numbers plus 8 in each byte, the first in its low half.
        USE_PTX: false if kernels are interpreted.
    """
    if USE_PTX and dtype == tl.bfloat16:
        AS_BF16: tl.constexpr = _INT8_AS_BF16 if BITS == 8 else (_HIGH_INT4_AS_BF16 if PLANE else _LOW_INT4_AS_BF16)
        return tl.inline_asm_elementwise(AS_BF16, "=r,=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4)
    elif USE_PTX and dtype == tl.float16:
        AS_FP16: tl.constexpr = _INT8_AS_FP16 if BITS == 8 else (_HIGH_INT4_AS_FP16 if PLANE else _LOW_INT4_AS_FP16)
        return tl.inline_asm_elementwise(AS_FP16, "=r,=r,r", [packed], dtype=tl.float16, is_pure=True, pack=4)
    elif BITS == 8:
        return packed.to(dtype)
    else:
        return (((packed >> (4 * PLANE)) & 15).to(tl.int32) - 8).to(dtype)


@triton.jit
def inputs_of_plane(pairs, PLANE: tl.constexpr, dtype: tl.constexpr):
    """The first or the second of two neighbouring inputs that were loaded as one integer."""
    HALF: tl.constexpr = tl.int32 if dtype == tl.float32 else tl.int16
    return (pairs >> (PLANE * dtype.primitive_bitwidth)).to(HALF).to(dtype, bitcast=True)


def bytes_with_one_scale(packed: Tensor, scale: Tensor, *, least: int = 16, most: int = 64) -> int:
    """Packed bytes of a row that a kernel takes at once, a power of two.

    They share a scale if at least `least` bytes do, which tensor cores need. Else the kernel reads a scale for each
    weight.

    Args:
        packed: int8[E, N, K] or uint8[E, N, K / 2].
        scale: float[E, N, G].
    """
    if scale.shape[2] == 1:
        return most
    num_bytes = most
    while num_bytes > least and packed.shape[2] % (scale.shape[2] * num_bytes):
        num_bytes //= 2
    return num_bytes
