"""Arithmetic on pairs: the sum hi + lo of two floats stands for a number of twice their digits.

Where float32 does not suffice, float64 would. But many GPUs have one float64 unit for each 64 of float32, and even where there is
one for each two, converting to float64 costs as much as this. In float64 the same code has some 100 bits.

Every rounding counts: kernels that use pairs are compiled with enable_fp_fusion=False, and what may be fused says ``fma``.
"""

import triton
import triton.language as tl

from . import launch

# Triton's interpreter takes a reduction of ours element by element.
INTERPRETED = tl.constexpr(launch.INTERPRETED)


@triton.jit
def widened(x):
    """float32 for narrower floats."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """In a pointer's dtype; float64 becomes bfloat16 by way of float32, since the interpreter cannot do it in one."""
    return (x.to(tl.float32) if dtype == tl.bfloat16 else x).to(dtype)


@triton.jit
def fma(x, y, z):
    """x y + z, rounded once. Triton 3.6 interprets ``tl.fma`` with two roundings, but a product of float32 fits in float64."""
    if INTERPRETED and x.dtype == tl.float32:
        return (x.to(tl.float64) * y.to(tl.float64) + z).to(tl.float32)
    return tl.fma(x, y, z)


@triton.jit
def from_float64(x, dtype: tl.constexpr):
    hi = x.to(dtype)
    return hi, (x - hi.to(tl.float64)).to(dtype)


@triton.jit
def to_float64(hi, lo):
    return hi.to(tl.float64) + lo.to(tl.float64)


@triton.jit
def normalized(hi, lo):
    """The same number with lo below half a last digit of hi."""
    total = hi + lo
    return total, lo - (total - hi)


@triton.jit
def add(a_hi, a_lo, b_hi, b_lo):
    """a + b. What hi + hi loses is found exactly (Knuth), whichever of them is the larger."""
    hi = a_hi + b_hi
    b = hi - a_hi
    return normalized(hi, (a_hi - (hi - b)) + (b_hi - b) + (a_lo + b_lo))


@triton.jit
def add_product(hi, lo, x, y):
    """hi + lo + x y for floats x and y, not normalized. What each rounding loses is found exactly; one rounding of x y + hi would
    be cheaper, but loses digits where they cancel."""
    xy = x * y
    total = hi + xy
    added = total - hi
    lost = (hi - (total - added)) + (xy - added)
    return total, lo + (lost + fma(x, y, -xy))


@triton.jit
def minus_product(a_hi, a_lo, x_hi, x_lo, y_hi, y_lo):
    """a − x y."""
    hi, lo = add_product(a_hi, a_lo, -x_hi, y_hi)
    return normalized(hi, fma(-x_hi, y_lo, fma(-x_lo, y_hi, lo)))


@triton.jit
def product(x_hi, x_lo, y_hi, y_lo):
    hi = x_hi * y_hi
    return normalized(hi, fma(x_hi, y_lo, fma(x_lo, y_hi, fma(x_hi, y_hi, -hi))))


@triton.jit
def reciprocal(hi, lo):
    """1 / (hi + lo), by one of Newton's steps from a quotient that need not be rounded well."""
    r = 1.0 / hi
    return normalized(r, r * tl.fma(-lo, r, fma(-hi, r, 1.0)))


@triton.jit
def total(hi, lo, axis: tl.constexpr):
    """The sum along an axis, to a pair's digits."""
    if INTERPRETED:
        return from_float64(tl.sum(to_float64(hi, lo), axis), hi.dtype)
    else:
        return tl.reduce((hi, lo), axis, add)


@triton.jit
def entry(hi, lo, at, axis: tl.constexpr):
    """The one entry along an axis where `at` holds."""
    return tl.sum(tl.where(at, hi, 0.0), axis), tl.sum(tl.where(at, lo, 0.0), axis)
