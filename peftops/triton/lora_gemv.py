"""LoRA's forward for few rows, as in decoding: its time is that of reading the base.

So there are as few launches as possible, and every multiprocessor reads a share of the base.

- One launch (gemv_kernel): every program makes x·aᵀ again, from L2, beside its columns of x·Ŵᵀ.
  That pays where a is small beside the base.
- Two launches: parts_kernel splits the sum over k into stripes and makes partial sums of x·Ŵᵀ
  and x·aᵀ, by different programs. finish_kernel adds them and applies b, gain and bias.
- "cublas" in fp32 and where rows do not start at multiples of 16 bytes, and "given" where x·Ŵᵀ
  is an input: the two launches again, without a base.
"""

import torch
import triton
import triton.language as tl

from . import _gemm
from ._gemm import tile
from ._launch import cdiv, launched, power_of_2
from ._tile import cast, dot, load_tile, store_tile
from .lora_product import multiply, operand, weight_slices
from .lora_rank import base_tile, gate_columns, widen


# limits: registers 64-255, spilled 0-16, reloads 0, loop 0-400, mma 8-, fma 0
# limits -BLOCK: loop 0-350, wide 8-, fma 0-
@launched
@triton.jit
def gemv_kernel(
    Y,
    X,
    W,
    A,
    B,
    SCALE,
    BIAS,
    GAIN,
    GATE,
    M,
    N,
    K,
    R,
    RB,
    E,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """y = gain ⊙ (x·Ŵᵀ + s · (gate ⊙ x·aᵀ)·bᵀ) + bias. Every program makes its own x·aᵀ."""
    if EVEN:
        N, K = N // 8 * 8, K // 8 * 8
    i_n, i_m = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_m, o_n = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    if BR > 0:
        o_r, t_h = tl.arange(0, BR), tl.zeros((BM, BR), tl.float32)
    for k in range(0, K, BK):
        o_k = k + tl.arange(0, BK)
        t_x = load_tile(X, o_m, o_k, M, K)
        acc = dot(
            t_x,
            base_tile(W, o_n, k, N, K, FORM, BLOCK, GROUP, BK, X.dtype.element_ty),
            acc,
        )
        if BR > 0:
            t_h = dot(
                t_x,
                tl.trans(cast(load_tile(A, o_r, o_k, R, K), X.dtype.element_ty)),
                t_h,
            )
    if BR > 0:
        t_h, delta = cast(t_h, X.dtype.element_ty), tl.zeros((BM, BN), tl.float32)
        for first in range(0, RB, R):
            o_b = tl.where(o_r < R, first + o_r, RB)
            t_b = cast(load_tile(B, o_n, o_b, N, RB), X.dtype.element_ty)
            delta = dot(
                gate_columns(t_h, GATE, o_m, o_b, M, RB, E), tl.trans(t_b), delta
            )
        acc += tl.load(SCALE) * delta
    store_tile(Y, widen(acc, GAIN, BIAS, o_n, N), o_m, o_n, M, N)


@triton.jit
def product(
    X,
    W,
    o_m,
    o_n,
    first,
    last,
    M,
    N,
    K,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """x·Wᵀ (BM, BN) over the columns from `first` to `last`."""
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(first, last, BK):
        t_w = base_tile(W, o_n, k, N, K, FORM, BLOCK, GROUP, BK, X.dtype.element_ty)
        acc = dot(
            load_tile(X, o_m, k + tl.arange(0, BK), M, K),
            cast(t_w, X.dtype.element_ty),
            acc,
        )
    return acc


# limits: registers 32-160, spilled 0-16, reloads 0, loop 0-180, mma 16-, wide 6-, fma 0
# limits -BLOCK: wide 12-, fma 0-
@launched
@triton.jit
def parts_kernel(
    YP,
    HP,
    X,
    W,
    A,
    M,
    N,
    K,
    R,
    KS,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Over a stripe of KS columns: x·aᵀ by the first programs, x·Ŵᵀ by all others."""
    if EVEN:
        N, K = N // 8 * 8, K // 8 * 8
    i_n = tl.program_id(0)
    i_s = tl.program_id(1).to(tl.int64)
    i_m = tl.program_id(2).to(tl.int64)
    o_m = i_m * BM + tl.arange(0, BM)
    first = tl.program_id(1) * KS
    ranks = tl.cdiv(R, BN)
    last = min(first + KS, K)
    if i_n < ranks:
        o_r = i_n * BN + tl.arange(0, BN)
        acc = product(
            X, A, o_m, o_r, first, last, M, R, K, "dense", None, None, BM, BN, BK
        )
        store_tile(HP + i_s * M * R, acc, o_m, o_r, M, R)
    elif FORM != "given":
        o_n = (i_n - ranks).to(tl.int64) * BN + tl.arange(0, BN)
        acc = product(
            X, W, o_m, o_n, first, last, M, N, K, FORM, BLOCK, GROUP, BM, BN, BK
        )
        store_tile(YP + i_s * M * N, acc, o_m, o_n, M, N)


# limits: registers 48-208, spilled 0-16, reloads 0, loop 0-540, mma 1-, wide 6-
@launched
@triton.jit
def finish_kernel(
    Y,
    YP,
    HP,
    B,
    SCALE,
    BIAS,
    GAIN,
    GATE,
    M,
    N,
    R,
    RB,
    E,
    YPARTS: tl.constexpr,
    HPARTS: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """y = gain ⊙ (Σ yp + s · (gate ⊙ Σ hp)·bᵀ) + bias, from partial sums yp and hp."""
    if EVEN:
        N = N // 8 * 8
    i_n, i_m = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_m, o_n = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for r in tl.range(0, RB, BR, num_stages=1):
        o_r, t_h = r + tl.arange(0, BR), tl.zeros((BM, BR), tl.float32)
        inside = (o_m[:, None] < M) & (o_r[None, :] < RB)
        for p in tl.static_range(HPARTS):
            t_h += tl.load(
                HP + (p * M + o_m[:, None]) * R + (o_r % R)[None, :],
                mask=inside,
                other=0.0,
            )
        t_h = gate_columns(cast(t_h, Y.dtype.element_ty), GATE, o_m, o_r, M, RB, E)
        acc = dot(
            t_h, tl.trans(cast(load_tile(B, o_n, o_r, N, RB), Y.dtype.element_ty)), acc
        )
    acc *= tl.load(SCALE)
    for p in tl.static_range(YPARTS):
        inside = (o_m[:, None] < M) & (o_n[None, :] < N)
        acc += tl.load(
            YP + (p * M + o_m[:, None]) * N + o_n[None, :], mask=inside, other=0.0
        )
    store_tile(Y, widen(acc, GAIN, BIAS, o_n, N), o_m, o_n, M, N)


STAGES = {"sm_80": 4, "sm_86": 3, "sm_90": 4, "sm_100": 4, "gfx942": 2, "interpret": 1}
SMALL = tile(4, 1, BN=32, BK=32)  # of fp32 and of the interpreter
FINISH = tile(4, 1, BM=16, BN=64)


def lora_gemv(y, x, base, a, b, scale, bias, gain, gate, form, block):
    m, k, n, rb = *x.shape, *b.shape
    r = a.shape[0]
    if m == 0:
        return
    launches = choose_launches(m, n, k, r, form, x)
    if launches == "cublas":
        multiply(y, x, weight_slices(base, form, block, n, x))
        base = [y]
    if launches in ("cublas", "given"):
        form = "given"
    experts = 1 if gate is None else gate.shape[1]
    even = n % 8 == k % 8 == 0
    bm = min(max(16, power_of_2(m)), 64)
    if launches == "one launch":
        sizes = one_launch_tile(n, bm, x, form)
        w, base_flags = operand(base, form, block, k, sizes["BK"])
        gemv_kernel[(cdiv(n, sizes["BN"]), cdiv(m, bm))](
            y,
            x,
            w,
            a,
            b,
            scale,
            bias,
            gain,
            gate,
            m,
            n,
            k,
            r,
            rb,
            experts,
            EVEN=even,
            BM=bm,
            BR=r and max(16, power_of_2(r)),
            **(sizes | base_flags),
        )
        return
    yp, hp = first_of_two_launches(x, base, a, n, form, block, even, bm)
    finish_kernel[(cdiv(n, FINISH["BN"]), cdiv(m, FINISH["BM"]))](
        y,
        yp,
        hp,
        b,
        scale,
        bias,
        gain,
        gate,
        m,
        n,
        r,
        rb,
        experts,
        YPARTS=yp.numel() // y.numel(),
        HPARTS=len(hp),
        EVEN=n % 8 == 0,
        BR=_gemm.rank_block(rb),
        **FINISH,
    )


def choose_launches(m, n, k, r, form, x):
    """Chooses "one launch", "two launches", "cublas" or "given", as in the module's docstring.

    In one launch every program reads a once: processors·r/n of what all read of the base, and
    that may be a quarter. Triton lays the tiles out for the product with b that follows x·aᵀ.
    Then all warps decode the same 4-bit weights, so these take one launch only where there is
    no adapter.
    """
    arch, processors = _gemm.machine(x.device)
    if form == "given":
        return "given"
    if x.dtype is torch.float32 or (arch != "interpret" and (n % 8 or k % 8)):
        return "cublas"
    most_ranks = 0 if form == "nf4" else 32
    if 4 * processors * r <= n and r <= most_ranks:
        return "one launch"
    return "two launches"


def one_launch_tile(n, bm, x, form):
    """The tile of gemv_kernel: as narrow as every multiprocessor's share of the base."""
    arch, processors = _gemm.machine(x.device)
    if arch == "interpret":
        return SMALL
    bn = min(max(32, power_of_2(n // processors + 1) // 2), 128)
    warps = 4 if bm < 64 and form != "nf4" else 8
    return tile(warps, STAGES[arch], BN=bn, BK=128 if bn < 128 else 64)


def first_of_two_launches(x, base, a, n, form, block, even, bm):
    """Launches parts_kernel.

    Returns:
        (partial sums of x·Ŵᵀ, or the product itself for form "given"; partial sums of x·aᵀ)
    """
    m, k, r = *x.shape, a.shape[0]
    arch, _ = _gemm.machine(x.device)
    sizes = SMALL
    if x.element_size() == 2 and arch != "interpret":
        sizes = tile(8, STAGES[arch], BN=64, BK=128)
    programs = cdiv(r, sizes["BN"])
    if form != "given":
        programs += cdiv(n, sizes["BN"])
    if programs == 0:
        return base[0], x.new_empty(0, m, r, dtype=torch.float32)
    count, span = _gemm.stripes(k, sizes["BK"], programs * cdiv(m, bm), x, most=16)
    w, base_flags = operand(base, form, block, k, sizes["BK"])
    product, yp = w, None
    if form == "given":
        w = None
    else:
        product = yp = x.new_empty(count, m, n, dtype=torch.float32)
    hp = x.new_empty(count, m, r, dtype=torch.float32)
    parts_kernel[(programs, count, cdiv(m, bm))](
        yp,
        hp,
        x,
        w,
        a,
        m,
        n,
        k,
        r,
        span,
        EVEN=even,
        BM=bm,
        **(sizes | base_flags),
    )
    return product, hp
