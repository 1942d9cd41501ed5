"""The GPU's kernels, in Triton: products of up to 16 rows with float, fp8, int8 and int4 weights.

    y = torch.ops.fast_gpu.linear(x, weight, scales)

Weights stay as files store them, except that int4's scales and zeros become pairs. One kernel reads each weight once
and multiplies on the tensor cores; `plain.py` multiplies more rows (prefill), or with fewer than 16 outputs.
`choice.py` measures which tiles are fastest, and whether Inductor's product of float weights is faster than the kernel.
No sum depends on the order in which programs run: equal inputs give equal bits.

Of experts (`model.MoEFeedForward`) it reads the weights of those chosen, whose numbers stay on the GPU.

The kernel also does what surrounds a product (`kernels.Product`), because a separate one for norm, gates or residual
would cost one or two microseconds. Bias, gates and residual are applied to the finished sums. RMSNorm, up to 8 rows:
inputs are scaled by its weight when loaded; 1/rms multiplies the finished sum.

Worth knowing: on an H100 warps wait for memory most of the time (`docs/gpu.md` has the times). Loading the weights of
the next iteration into registers ahead gained nothing there. With norm, float16 overflows where an input times the
norm's weight exceeds 65504.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import GATES, gpu, kind_of_pairs
from kernels.gpu.choice import INDUCTOR, fastest
from kernels.gpu.plain import (
    compiled,
    gated,
    normed,
    plain,
    scale_and_zero,
    sorted_by_expert,
    written_out,
)

MAX_ROWS = 16  # rows of x; more are a prefill
LEAST_OUTPUTS = 16  # outputs of a program, at least
NORM_ROWS = 8  # rows of x up to which the kernel applies RMSNorm
# (warps of a program, its outputs, iterations unrolled): each was fastest for some product on an H100; best first.
MANY_OUTPUTS = ((4, 64, 1), (4, 32, 1), (2, 32, 2), (2, 32, 1), (4, 64, 2), (4, 16, 2))
FEW_OUTPUTS = ((8, 16, 2), (16, 16, 1), (8, 16, 1), (4, 16, 2), (4, 16, 1), (8, 32, 1))
SMS = 132  # multiprocessors of an H100, assumed without a GPU
ONE = {torch.bfloat16: 0x3F80, torch.float16: 0x3C00}  # the bits of 1.0

# Triton after 3.6 distributes threads over the last dimensions first, up to 3.6 over the first; registers get the rest.
LAST_TO_FIRST = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) > (3, 6))


@triton.jit
def _registers(index):
    """`index` along the dimension of a loaded tensor whose elements lie in registers of the same thread."""
    return index[:, None, None] if LAST_TO_FIRST else index[None, :, None]


@triton.jit
def _threads(index):
    """`index` along the dimension of a loaded tensor whose elements lie in different threads."""
    return index[None, :, None] if LAST_TO_FIRST else index[:, None, None]


@triton.jit
def _threads_first(loaded):
    return tl.permute(loaded, (1, 0, 2)) if LAST_TO_FIRST else loaded


@triton.jit
def _nibbles(words, first: tl.constexpr, J: tl.constexpr, exponent, UP: tl.constexpr, dtype: tl.constexpr):
    """J nibbles of each half of the words `[S, 8, 4, B / 8, WORDS]`, as floats `[S, B, 8 * WORDS * J]`.

    J = 4 is all of them, J = 2 every second one from `first` on. No conversion is needed: a nibble is shifted to the
    top of the mantissa, UP bits from its end, and XORed with `exponent`, the bits of a float like 16.0.
    """
    S: tl.constexpr = words.shape[0]
    EIGHTS: tl.constexpr = words.shape[3]
    WORDS: tl.constexpr = words.shape[4]
    j = (first + tl.arange(0, J) * (4 // J))[None, None, None, None, None, :, None]
    half = tl.arange(0, 2)[None, None, None, None, None, None, :]
    w = tl.reshape(words, (S, 8, 4, EIGHTS, WORDS, 1, 1))
    w = w << tl.maximum(UP - 4 * j, 0) >> tl.maximum(4 * j - UP, 0)
    w = ((w & (0x000F000F << UP) ^ exponent) >> (16 * half)).to(tl.uint16).to(dtype, bitcast=True)
    return tl.reshape(tl.permute(w, (0, 3, 1, 4, 5, 2, 6)), (S, 8 * EIGHTS, 8 * WORDS * J))


@triton.jit
def _halves(words, dtype: tl.constexpr):
    """Both halves of the words `[S, 8, 4, B / 8, WORDS]`, which are floats already, `[S, B, 8 * WORDS]`."""
    S: tl.constexpr = words.shape[0]
    EIGHTS: tl.constexpr = words.shape[3]
    WORDS: tl.constexpr = words.shape[4]
    half = tl.arange(0, 2)[None, None, None, None, None, :]
    w = tl.reshape(words, (S, 8, 4, EIGHTS, WORDS, 1)) >> (16 * half)
    w = w.to(tl.uint16).to(dtype, bitcast=True)
    return tl.reshape(tl.permute(w, (0, 3, 1, 4, 2, 5)), (S, 8 * EIGHTS, 8 * WORDS))


@triton.jit
def _bytes(words, dtype: tl.constexpr):
    """The bytes of the words `[S, 8, 4, B / 8, WORDS]`, which are fp8, as floats `[S, B, 16 * WORDS]`.

    A power of two moves the exponent's bias, and makes subnormal numbers normal.
    """
    S: tl.constexpr = words.shape[0]
    EIGHTS: tl.constexpr = words.shape[3]
    WORDS: tl.constexpr = words.shape[4]
    DOWN: tl.constexpr = 4 if dtype == tl.bfloat16 else 1
    UP: tl.constexpr = 1.329227995784916e36 if dtype == tl.bfloat16 else 256.0
    j = tl.arange(0, 2)[None, None, None, None, None, :, None]
    half = tl.arange(0, 2)[None, None, None, None, None, None, :]
    w = tl.reshape(words, (S, 8, 4, EIGHTS, WORDS, 1, 1)) << (8 - 8 * j)
    w = (w & 0x80008000) | ((w & 0x7F007F00) >> DOWN)
    w = (w >> (16 * half)).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32) * UP
    return tl.reshape(tl.permute(w.to(dtype), (0, 3, 1, 4, 5, 2, 6)), (S, 8 * EIGHTS, 16 * WORDS))


@triton.jit
def _for_columns(loaded, S: tl.constexpr, COLUMNS: tl.constexpr):
    """A float32 for a chunk of each of B outputs, broadcast to the chunk's sums, `[S, B, COLUMNS]`."""
    t = _threads_first(loaded)
    B: tl.constexpr = 8 * t.shape[1]
    t = tl.reshape(tl.permute(tl.reshape(t, (S, 8, 4, B // 8)), (0, 3, 1, 2)), (S, B, 1, 4, 1))
    return tl.reshape(tl.broadcast_to(t, (S, B, COLUMNS // 8, 4, 2)), (S, B, COLUMNS))


@triton.jit
def let_overlap(OVERLAP: tl.constexpr):
    """Programmatic dependent launch: let the next kernel start, and wait for the results of the kernels before.

    A kernel must call this before it reads what another one writes, and before it writes what another one reads.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def overlapping() -> dict[str, bool]:
    """Launch arguments for a kernel that calls `let_overlap`."""
    return {"OVERLAP": gpu.OVERLAP, "launch_pdl": gpu.OVERLAP}


@triton.jit
def _gate(gate, up, GELU: tl.constexpr):
    # (1 + tanh(z / 2)) / 2 is sigmoid(z)
    return gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate) if GELU else gate) * up


@triton.jit
def _multiply(
    x_ptr,  # [rows, K]
    words_ptr,  # [N, K * BITS / 32], the stored weights as 32-bit words; BITS = 16: they are of x's type
    scales_ptr,  # int8: [N]; in groups: [N, K / GROUP], a 32-bit word of scale and zero, of fp8 a scale
    bias_ptr,  # [N] or None
    norm_ptr,  # [K] or None
    residual_ptr,  # like y, or None
    experts_ptr,  # [P] or None
    y_ptr,  # [rows, N], or [rows, N / 2] if gated; of experts [P, N] or [P, N / 2]
    rows,
    n_out,
    exponent,  # the bits of 1.0 in x's type, in both halves of the word
    eps,
    n_in: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PAIRS: tl.constexpr,  # their `kind_of_pairs`; 0: there are no groups
    GATED: tl.constexpr,  # 2: a program's outputs alternate between gate and up projection; 1: no gates
    GELU: tl.constexpr,  # the gates' activation, else SiLU
    ROWS: tl.constexpr,  # rows, rounded up to a power of two
    WORDS: tl.constexpr,  # words of an output's weights that a thread loads at a time
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,  # warps of a program, which divide K
    UNROLL: tl.constexpr,  # iterations of the loop that the compiler unrolls
    PER_ROW: tl.constexpr,  # experts for a row of x
    OVERLAP: tl.constexpr,
):
    """`y = x W^T`: a program computes BLOCK_N outputs for all rows of x; a thread loads a chunk of WORDS at a time.

    Each warp multiplies four chunks of K at once on the tensor cores, which expect a thread to hold the weights of one
    output at one of four places in K. The order of K does not matter if x has the same one: so a thread keeps the
    weights that it loaded, and x is permuted to match. No weights are exchanged between threads.

    The four chunks may span PARTS quantisation groups. To sum these separately, the inputs of each have columns of
    their own, which are zero for the others: of 8 columns the first ROWS_PER_PART hold rows of x for the first group.

    With experts, the weights of all are stacked, and there are P products of one row with one expert's, each computed
    by programs of its own: the second axis of the grid.

    A nibble u of 4 bits becomes the float 16 + u; those of 8 bits 24 + upper (signed) and 1 + lower / 16. Multiples of
    the sum of the inputs remove these offsets and add the zero. The exponent is an argument because with a constant
    the compiler spends two instructions, one to mask and one to merge.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    UP: tl.constexpr = 3 if dtype == tl.bfloat16 else 6  # bits in the mantissa below a nibble
    J: tl.constexpr = 16 // BITS  # weights in half a word
    CHUNK: tl.constexpr = 2 * J * WORDS  # weights
    PARTS: tl.constexpr = max(1, 4 * CHUNK // GROUP)
    ROWS_PER_PART: tl.constexpr = 8 // PARTS
    COLUMNS: tl.constexpr = max(8, PARTS * ROWS)
    LOADS: tl.constexpr = CHUNK // 8  # loads of 16 bytes for the inputs of a chunk
    n_chunks: tl.constexpr = n_in // CHUNK
    exponent = exponent.to(tl.uint32, bitcast=True)
    top = exponent + ((64 if BITS == 4 else 72) << UP) * 0x10001  # bits of 16; for int8 of 24, which flips the sign bit
    n_y = n_out // GATED
    if experts_ptr is not None:
        let_overlap(OVERLAP)
        pair = tl.program_id(1).to(tl.int64)
        first_out = tl.load(experts_ptr + pair) * n_out  # of this expert
        words_ptr += first_out * (n_in * BITS // 32)
        if BITS < 16:
            scales_ptr += first_out * (n_in // GROUP)
        x_ptr += pair // PER_ROW * n_in
        y_ptr += pair * n_y
    first_n = tl.minimum(tl.program_id(0) * (BLOCK_N // GATED), n_y - BLOCK_N // GATED).to(tl.int64)
    thread, row_block = _threads(tl.arange(0, 32 * SPLITS)), _registers(tl.arange(0, BLOCK_N // 8))
    lane_row, lane_column = thread // 4 % 8, thread % 4
    n = first_n + row_block * (8 // GATED) + lane_row // GATED + lane_row % GATED * n_y
    part = _registers(tl.arange(0, COLUMNS // 8 * LOADS))  # a chunk's LOADS, for every ROWS_PER_PART rows of x
    row = part // LOADS * ROWS_PER_PART + lane_row % ROWS_PER_PART
    ones = tl.full((SPLITS, 16, 4 * CHUNK), 1.0, tl.float32).to(dtype)
    totals = tl.zeros((SPLITS, BLOCK_N, COLUMNS), tl.float32)
    place = thread // 32 * 4 + lane_column
    if PAIRS:  # loaded an iteration ahead: the compiler would load late, at the use, and a warp would wait twice
        groups = n * (n_in // GROUP)
        next_scales = tl.load(scales_ptr + groups + tl.minimum(place, n_chunks - 1) * CHUNK // GROUP)
    if experts_ptr is None:
        let_overlap(OVERLAP)
    for first in tl.range(0, n_chunks, 4 * SPLITS, loop_unroll_factor=UNROLL):
        chunk = first + place
        if PAIRS:
            scales = next_scales
            next_chunk = tl.minimum(chunk + 4 * SPLITS, n_chunks - 1)
            next_scales = tl.load(scales_ptr + groups + next_chunk * CHUNK // GROUP)
        ok = (lane_row // ROWS_PER_PART == lane_column * PARTS // 4) & (row < rows) & (chunk < n_chunks)
        if n_chunks % (4 * SPLITS) != 0:
            chunk = tl.minimum(chunk, n_chunks - 1)  # beyond the end any weights will do, x is zero
        words = tl.load(words_ptr + (n * n_chunks + chunk) * WORDS + tl.arange(0, WORDS)[None, None, :])
        words = _threads_first(words.to(tl.uint32, bitcast=True))
        words = tl.reshape(words, (SPLITS, 8, 4, BLOCK_N // 8, WORDS))
        k = (chunk * LOADS + part % LOADS) * 8 + tl.arange(0, 8)[None, None, :]
        x = tl.load(x_ptr + row * n_in + k, mask=ok, other=0.0)
        if norm_ptr is not None:
            x = (x.to(tl.float32) * tl.load(norm_ptr + k).to(tl.float32)).to(dtype)
        x = tl.reshape(_threads_first(x), (SPLITS, 8, 4, COLUMNS // 8, WORDS, 2, J))
        x = tl.reshape(tl.permute(x, (0, 4, 6, 2, 5, 3, 1)), (SPLITS, 4 * CHUNK, COLUMNS))
        if BITS < 16 and PAIRS != 8:
            sums = tl.dot(ones, x)
            sums = tl.broadcast_to(tl.reshape(sums, (SPLITS, 1, 16, COLUMNS)), (SPLITS, BLOCK_N // 16, 16, COLUMNS))
            sums = tl.reshape(sums, (SPLITS, BLOCK_N, COLUMNS))
        if PAIRS:
            scales, zeros = scale_and_zero(scales, PAIRS)
            zeros = _for_columns(zeros, SPLITS, COLUMNS)
            scales = _for_columns(scales, SPLITS, COLUMNS)
        if BITS == 4:
            dots = tl.dot(_nibbles(words, 0, J, top, UP, dtype), x)
            totals += dots * scales + sums * (zeros - 24 * scales)
        elif BITS == 16:
            totals = tl.dot(_halves(words, dtype), x, totals)
        elif PAIRS == 8:
            totals += tl.dot(_bytes(words, dtype), x) * scales
        else:
            dots = tl.dot(_nibbles(words, 0, J, exponent, UP, dtype), x)
            dots = tl.dot(_nibbles(words, 1, J, top, UP, dtype), x, dots) - 25 * sums
            totals += dots * (16 * scales) + sums * zeros if PAIRS else dots
    y = tl.sum(tl.reshape(totals, (SPLITS, BLOCK_N, COLUMNS // 8, PARTS, ROWS_PER_PART)), 3)
    y = tl.reshape(tl.sum(y, 0), (BLOCK_N, COLUMNS // PARTS))
    row = tl.arange(0, COLUMNS // PARTS)
    if norm_ptr is not None:
        squares = tl.zeros((ROWS, 256 * SPLITS), tl.float32)
        at = tl.arange(0, ROWS)[:, None]
        for first in range(0, n_in, 256 * SPLITS):
            k = first + tl.arange(0, 256 * SPLITS)[None, :]
            x = tl.load(x_ptr + at * n_in + k, mask=(at < rows) & (k < n_in), other=0.0).to(tl.float32)
            squares += x * x
        factors = tl.rsqrt(tl.sum(squares, 1) / n_in + eps)[None, None, :]
        y *= tl.reshape(tl.broadcast_to(factors, (1, COLUMNS // PARTS // ROWS, ROWS)), (1, COLUMNS // PARTS))
    lane = tl.arange(0, BLOCK_N)
    n = first_n + lane // GATED + lane % GATED * n_y
    if BITS == 8 and not PAIRS:
        y *= 16 * tl.load(scales_ptr + n)[:, None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n).to(tl.float32)[:, None]
    if GATED == 2:
        gate, up = tl.split(tl.permute(tl.reshape(y, (BLOCK_N // 2, 2, COLUMNS // PARTS)), (0, 2, 1)))
        y = _gate(gate, up, GELU)
    n = first_n + tl.arange(0, BLOCK_N // GATED)
    at, ok = row[None, :] * n_y + n[:, None], (row < rows)[None, :] & (n < n_y)[:, None]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(dtype), mask=ok)


@torch.library.custom_op("fast_gpu::linear", mutates_args=())
def linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    activation: str = "",
    experts: Tensor | None = None,
    n_experts: int = 1,
    zeros_are: str = "middle",
) -> Tensor:
    """`x W^T`, `[M, N]`, for x `[M, K]` in bfloat16 or float16; other arguments as in `kernels.Product`.

    With `experts [T, k]` x has T or T k rows and the result T k; bias and residual are None.
    The weight is of x's type, `[N, K]`; or int8 `[N, K]` with `scales [N]`; or that of a `GroupedLinear` with `scales`,
    its pairs of scale and zero, `[N, K / G, 2]`, or of fp8 its scales, `[N, K / G]`. K is a multiple of 32. Raises
    ValueError for sizes that do not fit.
    """
    fused = bias, norm, eps, residual, activation
    again = functools.partial(linear, x, weight, scales, *fused, experts, n_experts, zeros_are)
    (rows, n_in), n_out = x.shape, weight.shape[0] // n_experts
    bits = 4 if weight.dtype == torch.uint8 else 8 * weight.element_size()
    pairs = 0
    if scales is not None and scales.dim() > 1:
        pairs, scales = kind_of_pairs(scales.dtype, zeros_are), scales.view(torch.int32)
    found = 8 * weight[0].nbytes // bits
    if found != n_in or n_in % 32:
        raise ValueError(f"x has {n_in} columns, the weight {found}: they must be equal and a multiple of 32")
    if activation and (n_out % 2 or activation not in GATES):
        raise ValueError(f"gates need an even number of outputs, not {n_out}, and an activation of {GATES}")
    if rows == 0:  # a draft's prefill asks for no logits
        return _linear_fake(x, weight, activation=activation, experts=experts, n_experts=n_experts)
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    few = (rows if experts is None else experts.shape[0]) <= MAX_ROWS and n_out >= LEAST_OUTPUTS
    n_chosen = 0 if experts is None else experts.numel()
    if norm is not None and few and rows > NORM_ROWS and experts is None:
        x, norm = normed(x, norm, eps), None
    group = n_in if scales is None else n_in * n_out * n_experts // scales.numel()
    with torch.cuda.device_of(x):
        if not few:
            w = weight if scales is None else written_out(x, weight, scales, bits, group, pairs)
            if experts is None:
                return plain(x, w, bias, norm, eps, residual, activation)
            y = sorted_by_expert(x if norm is None else normed(x, norm, eps), w.unflatten(0, (n_experts, -1)), experts)
            return gated(y, activation)
        per_row, rows = n_chosen // rows, rows if experts is None else 1  # of a product
        ways = ways_of(rows, n_in, n_out, bits, group, multiprocessors(x.device), n_chosen)
        key = f"{rows} x {n_in} to {n_out}, {bits} bits in groups of {group}, pairs {pairs}, {x.dtype}"
        if experts is not None:
            key += f", {n_chosen} of {n_experts} experts"
        inside = {"bias": bias, "norm": norm, "residual": residual, activation: activation or None}
        key += "".join(f", {name}" for name, given in inside.items() if given is not None)
        way = fastest(key, ways, again)
        if way is None:
            return compiled(key)(x, weight, bias, norm, eps, residual, activation)
        warps, outputs, _ = way
        programs = -(-n_out // outputs)
        y = _linear_fake(x, weight, activation=activation, experts=experts, n_experts=n_experts)
        words, one = weight.view(torch.int32), ONE[x.dtype] * 0x10001
        options = constants_of(rows, n_in, bits, group, activation, *way, per_row, pairs) | overlapping()
        if rows == 1:
            options |= registers_of(warps, programs * max(1, n_chosen), multiprocessors(x.device))
        tensors = x, words, scales, bias, norm, residual, None if experts is None else experts.contiguous(), y
        _multiply[programs, max(1, n_chosen)](*tensors, rows, n_out, one, eps, **options)
        return y


@linear.register_fake
def _linear_fake(
    x,
    weight,
    scales=None,
    bias=None,
    norm=None,
    eps=0.0,
    residual=None,
    activation="",
    experts=None,
    n_experts=1,
    zeros_are="",
):
    rows = x.shape[0] if experts is None else experts.numel()
    return x.new_empty(rows, weight.shape[0] // n_experts // (2 if activation else 1))


@functools.cache
def ways_of(
    rows: int, n_in: int, n_out: int, bits: int, group: int, multiprocessors: int, n_chosen: int = 0
) -> dict[str, tuple[int, int, int] | None]:
    """By name, the ways worth timing: (warps of a program, its outputs, iterations unrolled); None: Inductor's product.

    The first is the default where nothing was timed. Ways with too many warps for K or too many sums are left out.
    n_chosen: experts whose products are computed at a time, with `rows` each.
    """
    n_chunks = n_in * bits // (32 * chunk_words(rows, bits, group))
    most = 1 << (-(-n_chunks // 4) - 1).bit_length()
    tiles = MANY_OUTPUTS if n_out * max(1, n_chosen) > 128 * multiprocessors else FEW_OUTPUTS
    fitting = [way for way in tiles if way[0] <= most and way[1] <= min(n_out, 512 // rows)]
    fitting = fitting or [(most, LEAST_OUTPUTS, 1)]
    ways = {f"{way[0]} warps, {way[1]} outputs, {way[2]} unrolled": way for way in fitting}
    return ways | {INDUCTOR: None} if bits == 16 and not n_chosen else ways


def chunk_words(rows: int, bits: int, group: int) -> int:
    """The 32-bit words that a thread loads at a time. Fewer span fewer groups, and so need fewer columns."""
    return 4 if bits == 16 or max(32, 8 * rows) <= group else 2


def constants_of(
    rows: int,
    n_in: int,
    bits: int,
    group: int,
    activation: str,
    warps: int,
    outputs: int,
    unroll: int,
    per_row: int = 1,
    pairs: int = 0,
) -> dict[str, int]:
    """The constants for which `_multiply` is compiled. per_row: experts for a row of x."""
    shape = {"n_in": n_in, "BITS": bits, "GROUP": group, "PAIRS": pairs, "ROWS": 1 << (rows - 1).bit_length()}
    shape |= {"GATED": 2 if activation else 1, "GELU": activation == "gelu_tanh", "PER_ROW": per_row}
    blocks = {"WORDS": chunk_words(rows, bits, group), "BLOCK_N": outputs, "SPLITS": warps, "UNROLL": unroll}
    # Prefetching into shared memory (num_stages above 1) took 2 to 8 times as long on an H100.
    return {**shape, **blocks, "num_warps": warps, "num_stages": 1}


def registers_of(warps: int, programs: int, multiprocessors: int) -> dict[str, int]:
    """The most registers per thread with which all programs still run at once, if that is enough for a thread.

    With this limit the compiler need not save registers that nobody else uses: on an H100 products of few outputs took
    5 to 10 % less time.
    """
    most = min(255, 65536 // (32 * warps * -(-programs // multiprocessors)) // 8 * 8)
    return {"maxnreg": most} if most >= 48 else {}


def multiply(
    n_experts: int,
    zeros_are: str,
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
    experts: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """`Product.operator`; torch.compile sees, and can fuse, what surrounds many rows and sums the experts' outputs."""
    if experts is None and scales is None and x.shape[0] > MAX_ROWS:  # cuBLAS
        return plain(x, weight, bias, norm, eps, residual, activation)
    inside = residual if experts is None else None
    fused = bias, norm, eps, inside, activation
    y = torch.ops.fast_gpu.linear(x, weight, scales, *fused, experts, n_experts, zeros_are)
    if weights is None:
        return y
    y = (y.unflatten(0, experts.shape) * weights[..., None]).sum(1).to(x.dtype)
    return y if residual is None else residual + y


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else SMS
