"""Quantizes float32 rows to the K-quants of GGUF and to IQ4_NL and IQ4_XS, which gguf-py reads but does not write.

Every type keeps 256 weights in a super-block of small blocks. A block's scale (and minimum) is found by search: for each
of a row of candidate scales the weights are rounded, and the scale and minimum that are best for those codes follow by
weighted least squares; the candidate with the smallest error stays. Large weights count more, as they do in a product.
Then scales are rounded to their own few bits, and the codes are chosen anew for the scales as stored.

`python kquants.py` checks every type against gguf-py's dequantization.
"""
import numpy as np
import gguf
from gguf import GGMLQuantizationType as T

F = np.float32


def importance(x):
    """Weight of each element's squared error: grows with its size, and no element of a block counts nothing."""
    return np.abs(x) + np.sqrt((x * x).mean(-1, keepdims=True)) + F(1e-30)


def fit_offset(x, top):
    """Blocks x [n, b] as scale * code - minimum, codes 0..top, scale and minimum >= 0: (scale [n], minimum [n])."""
    w = importance(x)
    sw, swx = w.sum(-1), (w * x).sum(-1)
    low, high = np.minimum(x.min(-1), 0), x.max(-1)
    span = np.maximum(high - low, 1e-20)
    best = (span / top, -low)
    best_error = None
    for more in np.linspace(-1.0, 1.4, 17):
        q = np.clip(np.rint((x - low[:, None]) * ((top + more) / span)[:, None]), 0, top)
        sq, sqq, sqx = (w * q).sum(-1), (w * q * q).sum(-1), (w * q * x).sum(-1)
        det = sw * sqq - sq * sq
        ok = det > 0
        det = np.where(ok, det, 1)
        scale, minimum = (sw * sqx - swx * sq) / det, (sq * sqx - sqq * swx) / det
        negative = minimum < 0
        scale = np.where(negative, sqx / np.maximum(sqq, 1e-30), scale)
        minimum = np.where(negative, 0, minimum)
        ok &= scale > 0
        error = (w * (scale[:, None] * q - minimum[:, None] - x) ** 2).sum(-1)
        if best_error is None:
            q0 = np.clip(np.rint((x + best[1][:, None]) / best[0][:, None]), 0, top)
            best_error = (w * (best[0][:, None] * q0 - best[1][:, None] - x) ** 2).sum(-1)
        better = ok & (error < best_error)
        best = (np.where(better, scale, best[0]), np.where(better, minimum, best[1]))
        best_error = np.where(better, error, best_error)
    return best[0].astype(F), best[1].astype(F)


def fit_signed(x, low, high):
    """Blocks x [n, b] as scale * code, codes low..high, scale of either sign: scale [n]. The longer side of the codes, the
    negative one, goes to the largest weight."""
    w = importance(x)
    largest = np.take_along_axis(x, np.abs(x).argmax(-1)[:, None], -1)[:, 0]
    divisor = np.where(largest == 0, 1, largest)
    best, best_gain = np.zeros(len(x)), np.full(len(x), -1.0)
    for more in np.linspace(-1.2, 1.2, 17):
        q = np.clip(np.rint(x * ((low + more) / divisor)[:, None]), low, high)
        sqx, sqq = (w * q * x).sum(-1), (w * q * q).sum(-1)
        gain = np.where(sqq > 0, sqx * sqx / np.maximum(sqq, 1e-30), 0)  # what the block's weighted error falls by
        better = gain > best_gain
        best, best_gain = np.where(better, sqx / np.maximum(sqq, 1e-30), best), np.where(better, gain, best_gain)
    return best.astype(F)


def half(x):
    return x.astype(np.float16)


def divide(a, b):
    return np.where(b == 0, 0, a / np.where(b == 0, 1, b))


def offset_codes(x, block, top, scale_top):
    """Super-blocks x [n, 256] as codes with rounded scales: (d, dmin [n] f16, scales, minima [n, blocks], codes [n, 256])."""
    blocks = x.reshape(-1, block)
    scale, minimum = (v.reshape(len(x), -1) for v in fit_offset(blocks, top))
    d, dmin = half(scale.max(-1) / scale_top), half(minimum.max(-1) / scale_top)
    s = np.clip(np.rint(divide(scale, d.astype(F)[:, None])), 0, scale_top)
    m = np.clip(np.rint(divide(minimum, dmin.astype(F)[:, None])), 0, scale_top)
    step, shift = (s * d.astype(F)[:, None]).reshape(-1, 1), (m * dmin.astype(F)[:, None]).reshape(-1, 1)
    q = np.clip(np.rint(divide(blocks + shift, step)), 0, top)
    return d, dmin, s.astype(np.uint8), m.astype(np.uint8), q.reshape(len(x), 256).astype(np.uint8)


def signed_codes(x, block, low, high, scale_low, scale_high):
    """Super-blocks x [n, 256] as signed codes: (d [n] f16, scales [n, blocks], codes [n, 256])."""
    blocks = x.reshape(-1, block)
    scale = fit_signed(blocks, low, high).reshape(len(x), -1)
    widest = np.take_along_axis(scale, np.abs(scale).argmax(-1)[:, None], -1)[:, 0]
    d = half(widest / scale_low)
    s = np.clip(np.rint(divide(scale, d.astype(F)[:, None])), scale_low, scale_high)
    step = (s * d.astype(F)[:, None]).reshape(-1, 1)
    q = np.clip(np.rint(divide(blocks, step)), low, high)
    return d, s.astype(np.int8), q.reshape(len(x), 256).astype(np.int8)


def raw(*parts):
    return np.concatenate([np.ascontiguousarray(p).view(np.uint8).reshape(len(p), -1) for p in parts], -1)


def pack_scales(s, m):
    """Eight scales and minima of 6 bits in 12 bytes."""
    lo, hi = slice(0, 4), slice(4, 8)
    return np.concatenate([s[:, lo] | s[:, hi] >> 4 << 6, m[:, lo] | m[:, hi] >> 4 << 6, s[:, hi] & 15 | (m[:, hi] & 15) << 4], -1)


def nibbles(q):
    """Low four bits of codes [n, 256]: 32 codes in the low halves of 32 bytes, the next 32 in the high halves."""
    q = q.reshape(-1, 4, 2, 32) & 15
    return (q[:, :, 0] | q[:, :, 1] << 4).reshape(-1, 128)


def q4_k(x):
    d, dmin, s, m, q = offset_codes(x, 32, 15, 63)
    return raw(d, dmin, pack_scales(s, m), nibbles(q))


def q5_k(x):
    d, dmin, s, m, q = offset_codes(x, 32, 31, 63)
    fifth = (q.reshape(-1, 8, 32) >> 4 << np.arange(8, dtype=np.uint8)[:, None]).sum(1, dtype=np.uint8)
    return raw(d, dmin, pack_scales(s, m), fifth, nibbles(q))


def quarters(q):
    """Two bits of codes [n, 256]: four runs of 32 share 32 bytes."""
    q = q.reshape(-1, 2, 4, 32) & 3
    return (q << (2 * np.arange(4, dtype=np.uint8))[:, None]).sum(2, dtype=np.uint8).reshape(-1, 64)


def q2_k(x):
    d, dmin, s, m, q = offset_codes(x, 16, 3, 15)
    return raw(s | m << 4, quarters(q), d, dmin)


def q3_k(x):
    d, s, q = signed_codes(x, 16, -4, 3, -32, 31)
    q, s = (q + 4).astype(np.uint8), (s + 32).astype(np.uint8)
    third = ((q >> 2).reshape(-1, 8, 32) << np.arange(8, dtype=np.uint8)[:, None]).sum(1, dtype=np.uint8)
    high = ((s >> 4).reshape(-1, 4, 4) << (2 * np.arange(4, dtype=np.uint8))[:, None]).sum(1, dtype=np.uint8)
    return raw(third, quarters(q), (s[:, :8] & 15) | (s[:, 8:] & 15) << 4, high, d)


def q6_k(x):
    d, s, q = signed_codes(x, 16, -32, 31, -128, 127)
    q = (q + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = np.concatenate([q[:, :, :2] & 15 | (q[:, :, 2:] & 15) << 4], -1).reshape(-1, 128)
    high = (q >> 4 << (2 * np.arange(4, dtype=np.uint8))[:, None]).sum(2, dtype=np.uint8).reshape(-1, 64)
    return raw(low, high, s.view(np.uint8), d)


# The sixteen values of IQ4_NL and IQ4_XS, finer near zero.
LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], F)


def nearest_level(x):
    return np.searchsorted((LEVELS[1:] + LEVELS[:-1]) / 2, x)


def fit_levels(x):
    """Blocks x [n, b] as scale * LEVELS[code]: scale [n], by the search of `fit_signed`."""
    w = importance(x)
    largest = np.take_along_axis(x, np.abs(x).argmax(-1)[:, None], -1)[:, 0]
    divisor = np.where(largest == 0, 1, largest)
    best, best_gain = np.zeros(len(x)), np.full(len(x), -1.0)
    for top in [*np.linspace(-150, -100, 17), *np.linspace(95, 140, 8)]:
        q = LEVELS[nearest_level(x * (top / divisor)[:, None])]
        sqx, sqq = (w * q * x).sum(-1), (w * q * q).sum(-1)
        better = sqx * sqx / sqq > best_gain
        best, best_gain = np.where(better, sqx / sqq, best), np.where(better, sqx * sqx / sqq, best_gain)
    return np.where(largest == 0, 0, best).astype(F)


def level_codes(blocks, step):
    """Blocks of 32 as nibbles: the first 16 codes in the low halves of 16 bytes, the others in the high halves."""
    q = nearest_level(divide(blocks, step[:, None])).astype(np.uint8)
    return q[:, :16] | q[:, 16:] << 4


def iq4_nl(x):
    blocks = x.reshape(-1, 32)
    d = half(fit_levels(blocks))
    return raw(d, level_codes(blocks, d.astype(F)))


def iq4_xs(x):
    blocks = x.reshape(-1, 32)
    scale = fit_levels(blocks).reshape(len(x), 8)
    widest = np.take_along_axis(scale, np.abs(scale).argmax(-1)[:, None], -1)[:, 0]
    d = half(widest / -32)
    s = np.clip(np.rint(divide(scale, d.astype(F)[:, None])), -32, 31)
    codes = level_codes(blocks, (s * d.astype(F)[:, None]).reshape(-1))
    s = (s + 32).astype(np.uint8)
    high = (s.astype(np.uint16) >> 4 << (2 * np.arange(8, dtype=np.uint16))).sum(-1, dtype=np.uint16)
    return raw(d, high, s[:, ::2] & 15 | (s[:, 1::2] & 15) << 4, codes.reshape(len(x), 128))


OURS = {T.Q2_K: q2_k, T.Q3_K: q3_k, T.Q4_K: q4_k, T.Q5_K: q5_k, T.Q6_K: q6_k, T.IQ4_NL: iq4_nl, T.IQ4_XS: iq4_xs}


def quantize(x, qtype):
    """x [..., row] float32 to the bytes of a GGUF tensor, [..., bytes of a row]."""
    if qtype not in OURS:
        return gguf.quants.quantize(x, qtype)
    return OURS[qtype](x.reshape(-1, 256).astype(F)).reshape(*x.shape[:-1], -1)


if __name__ == "__main__":
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((2048, 256)) * np.exp(rng.standard_normal((2048, 1)))).astype(F)
    x[0] = 0
    x[1] = np.abs(x[1])
    for qtype in [*OURS, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0]:
        y = gguf.quants.dequantize(quantize(x, qtype), qtype)
        error = np.sqrt(((x - y) ** 2).sum() / (x ** 2).sum())
        print(f"{qtype.name}: relative RMS error {error:.4f}")
        assert np.isfinite(y).all() and not y[0].any() and error < {T.Q2_K: 0.35, T.Q3_K: 0.2}.get(qtype, 0.12)
