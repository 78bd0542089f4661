# ruff: noqa: RUF001 (the sizes are written with a multiplication sign)
"""For each op what one program of its kernels owns, as :mod:`benchmarks.tile_svg` draws it.

Grids are small stand-ins: a cell is a row, a block or a tile of the real tensor, as its sizes say. What they
show is that of ``kernels/ops/<op>/triton.py``, of ``linear`` that of ``kernels/csrc/linear.cpp``.
"""

from __future__ import annotations

from benchmarks.tile_svg import Grid, Panel


def row(at: int, letter: str, *, of: int = 6, wide: int = 6) -> tuple[str, ...]:
    """Cells of a tensor of which one row is touched."""
    return tuple((letter if i == at else ".") * wide for i in range(of))


def full(letter: str, *, high: int, wide: int) -> tuple[str, ...]:
    return (letter * wide,) * high


PHILOX = (
    Panel(
        "a program: 512 blocks of four words",
        (Grid("state", "seed, step", ("rr",)),),
        ("key = seed", "counter = (block, row, stream, step)", "10 x (2 products, 4 xors)"),
        (Grid("words", "rows × blocks × 4", ("....", "wwww", "wwww", "wwww", "....", "....")),),
    ),
)

MASK_PLAN = (
    Panel(
        "a program: one sample",
        (
            Grid("state", "seed, step", ("rr",)),
            Grid("counts", "B × two", ("rr", "rr", "rr", "rr")),
        ),
        (
            "L random words in registers",
            "both thresholds bit by bit, no sort",
            "counts before it = its offsets",
        ),
        (
            Grid("source, is masked", "B × S", row(2, "w", of=4, wide=6)),
            Grid("rows", "T, its slice", ("..", "..", "ww", "ww", "..", "..")),
        ),
    ),
)

EMBED_KEPT = (
    Panel(
        "forward, a program: one kept token",
        (
            Grid("ids", "B × L", ("....", ".r..", "....")),
            Grid("words", "V × D", row(3, "r", wide=5)),
            Grid("positions", "S × D", row(1, "r", of=5, wide=5)),
        ),
        ("e = word + position", "LayerNorm in registers", "dropout drawn here"),
        (Grid("x", "T × D", row(2, "w", of=5, wide=5)),),
    ),
    Panel(
        "backward, the sums for the words, a program: 64 of the sorted ids",
        (
            Grid("sorted ids", "T", (".", ".", "r", "r", "r", ".")),
            Grid("gradient of e", "T × D", ("....", "rrrr", "....", "rrrr", "....", "rrrr")),
        ),
        ("sum rows of the same id", "pieces added in order, no atomics"),
        (Grid("gradient of words", "V × D", ("....", "wwww", "....", "wwww", "....", "....")),),
    ),
)

ADD_NORM = (
    Panel(
        "forward, a program: one row",
        (Grid("branch", "T × D", row(2, "r")), Grid("residual", "T × D", row(2, "r"))),
        ("s = residual + dropout(branch)", "mean, then variance in registers", "y = normed s"),
        (Grid("out", "T × D", row(2, "w")), Grid("normed", "T × D", row(2, "w"))),
    ),
    Panel(
        "backward, a program: every n-th row",
        (
            Grid("gradients", "T × D, two", ("rrrrrr", "......", "......", "rrrrrr", "......", "......")),
            Grid("out", "T × D", ("rrrrrr", "......", "......", "rrrrrr", "......", "......")),
        ),
        ("the dropout mask drawn again", "sums for scale and shift kept", "across its rows"),
        (
            Grid("gradients", "T × D, two", ("wwwwww", "......", "......", "wwwwww", "......", "......")),
            Grid("partial sums", "n × D", ("wwwwww", "......", "......")),
        ),
    ),
)

_HEAD = ("c.....", "r.....", "r.....", "r.....", "r.....")
ATTENTION = (
    Panel(
        "up to 129 tokens, a program: one head of one sequence",
        (
            Grid("Q", "129 × H heads", _HEAD),
            Grid("K", "129 × H heads", _HEAD),
            Grid("V", "129 × H heads", _HEAD),
        ),
        ("softmax starts from the class token:", "m = q·k0, l = 1, acc = v0", "then 128 keys in whole tiles"),
        (Grid("O", "129 × H heads", ("w.....",) * 5),),
    ),
    Panel(
        "longer, a program: a tile of 64 queries",
        (
            Grid("Q", "of a head", (".", ".", "r", ".", ".")),
            Grid("K", "of a head", ("c", "r", "r", "r", "r")),
            Grid("V", "of a head", ("c", "r", "r", "r", "r")),
        ),
        ("for each tile of 64 keys:", "  P = exp2(Q Kᵀ - m), dropout", "  acc += P V,  running m and l"),
        (Grid("O", "of a head", (".", ".", "w", ".", ".")),),
    ),
    Panel(
        "sequences of different lengths, packed: programs past an end return at once",
        (Grid("tiles of keys", "sequence × tile", ("rrrr", "rrxx", "rxxx", "rrrx")),),
        ("cu_seqlens[b] : cu_seqlens[b + 1]", "work = sum of the sequences' own tiles"),
        (Grid("O", "T rows", ("wwww", "wwxx", "wxxx", "wwwx")),),
    ),
)

LINEAR = (
    Panel(
        "on a CPU with AVX-512, a thread: the next panel of 64 columns",
        (
            Grid("x", "T × D", full("r", high=5, wide=4)),
            Grid("weight", "F × D, float32", ("....", "....", "rrrr", "....", "....", "....")),
        ),
        (
            "the panel packed, in bfloat16 rounded,",
            "in the thread's own cache; then",
            "tiles of 6 rows × the panel",
        ),
        (Grid("y", "T × F", ("..w...",) * 5),),
    ),
)

BIAS_GELU = (
    Panel(
        "forward, a program: 2 × 1024 elements",
        (
            Grid("x", "T × F", ("........", "..rrr...", "..rrr...", "........", "........", "........")),
            Grid("bias", "F", ("..rrr...",)),
        ),
        ("s = x + bias", "s Φ(s): one polynomial under exp2", "dropout drawn here"),
        (Grid("y", "T × F", ("........", "..www...", "..www...", "........", "........", "........")),),
    ),
    Panel(
        "backward, a program: 64 rows of 1024 columns",
        (
            Grid("x and gradient", "T × F", ("..rrr...",) * 4 + ("........",) * 2),
            Grid("bias", "F", ("..rrr...",)),
        ),
        ("walks two rows at a time", "sums the bias's gradient"),
        (
            Grid("gradient of x", "T × F", ("..www...",) * 4 + ("........",) * 2),
            Grid("partial sums", "blocks × F", ("..www...", "........")),
        ),
    ),
)

PAD_DECODER = (
    Panel(
        "forward, a program: one position of one image",
        (
            Grid("source", "B × S", ("..r..", ".....", ".....")),
            Grid("encoded", "T × D", ("ccccc", ".....", "rrrrr", ".....", ".....")),
            Grid("positions", "S × D", row(2, "r", of=5, wide=5)),
        ),
        ("source >= 0: that row", "source = -1: the class row", "+ position"),
        (Grid("decoder's input", "B·S × D", row(2, "w", of=5, wide=5)),),
    ),
    Panel(
        "backward, a program: 16 images × 8 positions",
        (Grid("gradient", "B × S", ("..rr..",) * 3 + ("......",) * 2),),
        (
            "visible: copied to its row",
            "padded: summed for the class row",
            "over images: summed for positions",
        ),
        (
            Grid("gradient of encoded", "T × D", ("wwww", "....", "wwww", "....", "....")),
            Grid("partial sums", "fixed order", ("..ww..",)),
        ),
    ),
)

MASKED_CROSS_ENTROPY = (
    Panel(
        "forward, a program: one row of logits",
        (Grid("logits", "N × C", row(2, "r", wide=10)), Grid("targets", "N", (".", ".", "r", ".", ".", "x"))),
        ("row held in registers", "log-sum-exp, target, mean", "target -1: nothing"),
        (Grid("loss, lse", "N", (".", ".", "w", ".", ".", ".")),),
    ),
    Panel(
        "backward, a program: one row again",
        (Grid("logits", "N × C", row(2, "r", wide=10)), Grid("lse", "N", (".", ".", "r", ".", ".", "."))),
        ("exp(logit - lse) - smoothed target", "scaled by the loss's gradient / count"),
        (Grid("gradient", "N × C", row(2, "w", wide=10)),),
    ),
)

LINEAR_CROSS_ENTROPY = (
    Panel(
        "a chunk of rows: at most 32 MiB of logits between two products",
        (
            Grid("hidden", "N × D", ("....", "rrrr", "rrrr", "....", "....", "....")),
            Grid("weight", "C × D", full("r", high=6, wide=4)),
        ),
        (
            "1  logits = hidden @ weightᵀ  (cuBLAS)",
            "2  a program a row: loss, and the",
            "   gradient where the logits lie",
            "3  gradient @ weight          (cuBLAS)",
        ),
        (
            Grid("chunk", "rows × C", full("w", high=2, wide=6)),
            Grid("gradient of hidden", "N × D", ("....", "wwww", "wwww", "....", "....", "....")),
        ),
    ),
)

SAMPLE_CONFIDENT = (
    Panel(
        "first kernel, a program: one token",
        (
            Grid("ids", "B × L", ("x.x...", ".xr..x", "..x...")),
            Grid("logits", "N × C", row(3, "r", wide=8)),
        ),
        (
            "known: keep the id, read no logits",
            "guidance, top-k, top-p: bit by bit",
            "id = argmax(logit + Gumbel)",
        ),
        (Grid("id, confidence", "B × L", ("......", "..w...", "......")),),
    ),
    Panel(
        "second kernel, a program: one sample",
        (Grid("confidence", "B × L", row(1, "r", of=3)), Grid("counts", "B", (".", "r", "."))),
        ("the n-th least confident, bit by bit", "those below it are masked again"),
        (Grid("next ids", "B × L", ("......", "wxwwxw", "......")),),
    ),
)

GROUP_NORM_SILU = (
    Panel(
        "first kernel, a program: a chunk of pixels for 128 channels",
        (Grid("x", "pixels × channels", ("....", ".rr.", ".rr.", "....", "....", "....")),),
        ("mean and squared deviations", "of each channel over the chunk"),
        (Grid("statistics", "chunks × channels", ("....", ".ww.", "....")),),
    ),
    Panel(
        "third kernel, the same tile again",
        (
            Grid("x", "pixels × channels", ("....", ".rr.", ".rr.", "....", "....", "....")),
            Grid("of groups", "mean, rstd", (".rr.",)),
        ),
        ("y = (x - mean) rstd · weight + bias", "y σ(y)"),
        (Grid("out", "pixels × channels", ("....", ".ww.", ".ww.", "....", "....", "....")),),
    ),
    Panel(
        "small maps, a program: whole groups, in registers",
        (Grid("x", "pixels × channels", (".r..",) * 4),),
        ("statistics and result", "in one launch, one read"),
        (Grid("out", "pixels × channels", (".w..",) * 4),),
    ),
)

NEAREST_CODE = (
    Panel(
        "a program: 128 features against the whole codebook",
        (
            Grid("features", "N × D", ("....", "rrrr", "rrrr", "....", "....", "....")),
            Grid("codebook", "K × D, in tiles", full("r", high=6, wide=4)),
            Grid("|c|²", "K", full("r", high=6, wide=1)),
        ),
        ("for each tile of codes:", "  d = |c|² - 2 x·c   in registers", "  running minimum and its index"),
        (Grid("index", "N", (".", "w", "w", ".", ".", ".")),),
    ),
)

#: Op -> its panels.
TILINGS: dict[str, tuple[Panel, ...]] = {
    "philox": PHILOX,
    "mask_plan": MASK_PLAN,
    "embed_kept": EMBED_KEPT,
    "add_norm": ADD_NORM,
    "attention": ATTENTION,
    "linear": LINEAR,
    "bias_gelu": BIAS_GELU,
    "pad_decoder": PAD_DECODER,
    "masked_cross_entropy": MASKED_CROSS_ENTROPY,
    "linear_cross_entropy": LINEAR_CROSS_ENTROPY,
    "sample_confident": SAMPLE_CONFIDENT,
    "group_norm_silu": GROUP_NORM_SILU,
    "nearest_code": NEAREST_CODE,
}
