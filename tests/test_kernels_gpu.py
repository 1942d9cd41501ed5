"""The GPU kernels: runs `gpu_checks.py` in Triton's interpreter and on a GPU, and inspects the compiled code.

    python -m pytest tests/test_kernels_gpu.py

Worth knowing: Triton includes NVIDIA's assembler, so kernels can be compiled for a GPU on a machine without one.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs the package triton")
CHECKS = Path(__file__).with_name("gpu_checks.py")
# The most bytes of registers that a thread may save to memory, and of two kernels, which need more with Triton 3.8.
SPILLED = 8
SPILLED_BY_TWO = 48 if triton.__version__.startswith("3.8.") else SPILLED
STORED = {4: ("*u8", "*i32"), 8: ("*i8", "*fp32"), 16: ("*bf16", None)}  # bits -> types of weights and scales
ALIGNED = ("n_out", "exponent")


def run_checks(**environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "--noconftest", "-x", "-p", "no:cacheprovider", str(CHECKS)]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, cwd=CHECKS.parent.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


def test_in_the_interpreter():
    run_checks(TRITON_INTERPRET="1")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu():
    run_checks()


def test_kernels_that_do_not_run_are_a_reason(monkeypatch):
    """The tensors are on a CPU here, so every launch fails."""
    from kernels import gpu

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    reason = gpu.missing.__wrapped__("cpu", torch.bfloat16)
    assert re.fullmatch(r"a GPU's kernels fail on NVIDIA H100: \w+Error: .+", reason)


@dataclass
class Compiled:
    ptx: str
    binary: Path

    def issued(self, turns: int) -> int:
        """Instructions that a warp issues if the longest loop runs `turns` times; other code counts once."""
        sass = dump("--dump-sass", self.binary)
        code = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);", sass)
        jumps = [(at, re.search("0x([0-9a-f]+)", to)) for at, what, to in code if what.startswith("BRA")]
        loops = [range(int(to[1], 16), int(at, 16) + 1) for at, to in jumps if to]
        longest = max(loops, key=len)  # a jump forward is an empty range
        return len(code) + (turns - 1) * sum(int(at, 16) in longest for at, *_ in code)


def dump(what: str, binary: Path) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, what, binary], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """`compiled(kernel, capability, types, **constants)`: its PTX and machine code.

    Fails if more than `spilled` bytes of registers spill, or if a program needs more shared memory than the GPU allows.
    Pointers and the arguments in ALIGNED are declared divisible by 16; an argument with neither type nor constant is an
    int32.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def make(
        kernel,
        capability: int,
        types: dict[str, str],
        num_warps=4,
        num_stages=3,
        maxnreg=None,
        spilled=SPILLED,
        **constants,
    ) -> Compiled:
        names = kernel.arg_names
        constants = {name: value for name, value in ({"OVERLAP": False} | constants).items() if name in names}
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
        aligned = {
            (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*" or n in ALIGNED
        }
        source = ASTSource(kernel, signature, constants, aligned)
        options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
        built = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert built.metadata.shared <= {80: 163, 86: 99, 90: 227}[capability] * 1024
        binary = tmp_path / "kernel.cubin"
        binary.write_bytes(built.asm["cubin"])
        usage = dump("--dump-resource-usage", binary)
        stack, local = re.search(r"STACK:(\d+) .* LOCAL:(\d+) ", usage).groups()
        assert int(stack) <= spilled, usage
        assert local == "0", usage
        return Compiled(built.asm["ptx"], binary)

    return make


def product_types(bits: int, *present: str) -> tuple[dict[str, str], dict[str, None]]:
    """Types of `_multiply`'s arguments, and those that are None: bias, norm, residual and experts unless `present`."""
    types = {"x_ptr": "*bf16", "words_ptr": "*i32", "y_ptr": "*bf16", "eps": "fp32", **dict.fromkeys(present, "*bf16")}
    types |= {"experts_ptr": "*i64"} if "experts_ptr" in present else {}
    absent = {"bias_ptr", "norm_ptr", "residual_ptr", "experts_ptr"}.difference(present)
    if bits == 16:
        return types, dict.fromkeys(absent | {"scales_ptr"})
    return types | {"scales_ptr": STORED[bits][1]}, dict.fromkeys(absent)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("bits", "group", "pairs", "rows", "present", "activation", "most"),
    [
        (4, 32, 1, 1, ("norm_ptr",), "silu", 3),
        (4, 32, 1, 2, ("norm_ptr", "bias_ptr"), "", 3),
        (4, 32, 1, 4, ("residual_ptr",), "", 3),
        (4, 32, 1, 8, ("norm_ptr",), "gelu_tanh", 4),
        (4, 32, 1, 16, ("residual_ptr",), "", 6.5),
        (4, 128, 1, 8, ("norm_ptr",), "", 2.5),
        (4, 128, 1, 16, (), "silu", 4),
        (8, 4096, 0, 2, ("norm_ptr",), "silu", 4.5),
        (8, 4096, 0, 8, (), "", 3.5),
        (8, 4096, 0, 16, ("residual_ptr",), "", 5.5),
        (16, 4096, 0, 1, ("norm_ptr",), "silu", 2.5),
        (16, 4096, 0, 6, ("norm_ptr", "bias_ptr"), "", 3.5),
        (16, 4096, 0, 16, ("residual_ptr",), "", 3.5),
        (4, 32, 1, 1, ("norm_ptr", "experts_ptr"), "silu", 3),
        (8, 4096, 0, 1, ("experts_ptr",), "", 4.5),
        (16, 4096, 0, 1, ("norm_ptr", "experts_ptr"), "silu", 2.5),
        (4, 32, 6, 1, ("norm_ptr",), "silu", 3),
        (4, 128, 7, 1, ("norm_ptr",), "silu", 3),
        (4, 128, 3, 8, ("residual_ptr",), "", 3),
        (8, 32, 6, 1, ("norm_ptr",), "silu", 4.5),
        (8, 128, 7, 4, ("residual_ptr",), "", 4.5),
        (8, 128, 8, 1, ("norm_ptr",), "silu", 4.5),
        (8, 128, 8, 4, ("residual_ptr",), "", 4.5),
    ],
)
def test_threads_do_not_exchange_weights(compiled, capability, bits, group, pairs, rows, present, activation, most):
    """No data passes between threads until the last `mma`; a program issues less than `most` instructions per weight.

    An instruction counts once for every thread.
    """
    from kernels.gpu import products

    types, absent = product_types(bits, *present)
    types |= {"scales_ptr": "*i32"} if pairs else {}
    n_out = 28672
    (warps, outputs, unrolled), *_ = products.ways_of(rows, 4096, n_out, bits, group, products.SMS).values()
    assert unrolled == 1
    shape = products.constants_of(rows, 4096, bits, group, activation, warps, outputs, unrolled, pairs=pairs)
    shape |= products.registers_of(warps, n_out // outputs, products.SMS) if rows == 1 else {}
    words = shape["WORDS"]
    one = {"rows": 1} if rows == 1 else {}  # Triton makes an argument of 1 a constant
    spilled = SPILLED_BY_TWO if (capability, pairs, rows) == (90, 8, 1) else SPILLED
    code = compiled(products._multiply, capability, types, spilled=spilled, **shape, **absent, **one)
    ptx, turns = code.ptx, 4096 * bits // (32 * words) // (4 * warps)
    assert 32 * warps * code.issued(turns) < most * outputs * 4096
    assert len(re.findall(rf"ld\.global\.v{words}\.b32", ptx)) >= outputs // 8
    end = ptx.rindex("mma.sync")
    assert not re.search("shfl|bar.sync|shared", ptx[ptx.index("{") : end])
    assert "bar.sync" in ptx[end:]


@pytest.mark.parametrize(
    ("bits", "others", "before"),
    [(4, ["residual_ptr"], 4), (8, ["residual_ptr"], 0), (16, ["residual_ptr"], 0), (4, ["experts_ptr"], 0)],
)
def test_a_product_that_overlaps_waits_for_its_inputs(compiled, bits, others, before):
    """Before the wait only int4 scales and zeros are read: one load for each of a thread's 4 (of 32) outputs.

    Those of experts are not known before the wait.
    """
    from kernels.gpu import products

    types, absent = product_types(bits, "norm_ptr", *others)
    constants = products.constants_of(1, 4096, bits, 32 if bits == 4 else 4096, "", 4, 32, 1, pairs=int(bits == 4))
    ptx = compiled(products._multiply, 90, types, **constants, **absent, rows=1, OVERLAP=True).ptx
    assert accesses_before_waiting(ptx) == before


def accesses_before_waiting(ptx: str) -> int:
    assert ptx.index("griddepcontrol.launch_dependents") < ptx.index("griddepcontrol.wait")
    return len(re.findall(r"(?:ld|st)\.global|cp\.async", ptx[: ptx.index("griddepcontrol.wait")]))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("n_experts", "k"), [(8, 2), (128, 8)])
def test_the_router_waits_for_its_inputs(compiled, capability, n_experts, k):
    from kernels.gpu import routing

    overlap = capability == 90
    types = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "norm_ptr": "*bf16", "scores_ptr": "*fp32", "eps": "fp32"}
    shape = {"n_in": 2048, "BLOCK_E": routing.EXPERTS, "BLOCK_K": routing.INPUTS, "OVERLAP": overlap}
    score = compiled(routing._score, capability, types, num_warps=8, **shape).ptx
    types = {"scores_ptr": "*fp32", "experts_ptr": "*i64", "weights_ptr": "*fp32"}
    shape = {"k": k, "NORMALIZES": True, "BLOCK_E": n_experts, "BLOCK_J": k, "OVERLAP": overlap}
    choose = compiled(routing._choose, capability, types, num_warps=1, **shape).ptx
    assert re.search(r"ld\.global\S*\.v[24]", score)
    assert not overlap or accesses_before_waiting(score) == accesses_before_waiting(choose) == 0


@pytest.mark.parametrize(("bits", "group", "pairs"), [(4, 32, 1), (4, 256, 7), (8, 4096, 0), (8, 32, 6), (8, 128, 8)])
def test_weights_are_written_16_bytes_at_a_time(compiled, bits, group, pairs):
    from kernels.gpu import plain

    weights, scales = STORED[bits]
    types = {"weight_ptr": weights, "scales_ptr": "*i32" if pairs else scales, "w_ptr": "*bf16"}
    shape = {"n_in": 4096, "BITS": bits, "GROUP": group, "PAIRS": pairs, "BLOCK_N": 16, "BLOCK_K": 256}
    for capability in (80, 90):
        assert "st.global.v4" in compiled(plain.dequantize, capability, types, **shape).ptx


@pytest.mark.parametrize(
    ("capability", "cached", "heads", "S", "D"),
    [
        (80, "*bf16", 4, 1, 128), (90, "*bf16", 4, 1, 128), (86, "*bf16", 8, 16, 128), (86, "*i8", 8, 16, 128),
        (80, "*i8", 4, 1, 128), (90, "*i8", 4, 1, 128), (90, "*i8", 4, 6, 128), (90, "*fp8e4nv", 4, 1, 128),
        (86, "*bf16", 4, 1, 256), (86, "*i8", 4, 16, 256), (90, "*i8", 4, 6, 256),
    ],
)  # fmt: skip
def test_attention_runs_on_the_tensor_cores(compiled, capability, cached, heads, S, D):
    from kernels.gpu import flash_decoding

    found, rows = {"sums_ptr": "*fp32", "peaks_ptr": "*fp32", "totals_ptr": "*fp32"}, heads * S
    types = dict.fromkeys(("qkv_ptr", "q_norm_ptr", "k_norm_ptr"), "*bf16") | dict.fromkeys(("k_ptr", "v_ptr"), cached)
    types |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "positions_ptr": "*i64", "scale": "fp32", "eps": "fp32", **found}
    shape = {"KV": 8, "HEADS": heads, "D": D, "BLOCK_D": D, "SPLITS": 64, **({"S": 1} if S == 1 else {})}
    blocks = {
        "ROWS": max(16, triton.next_power_of_2(rows)),
        "NEW": 16,
        "BLOCK_HALF": D // 2,
        "BLOCK": flash_decoding.block_of(rows, D),
    }
    scales = dict.fromkeys(("k_scales_ptr", "v_scales_ptr"), None if cached == "*bf16" else "*fp32")
    constants = {**shape, **blocks, "WINDOW": 0, **(scales if cached == "*bf16" else {})}
    warps = 4 if rows <= 32 else 8
    for overlap in (False, True) if (capability, cached) == (90, "*bf16") else (False,):
        constants["OVERLAP"] = shape["OVERLAP"] = overlap
        options = {
            "num_warps": warps,
            "spilled": SPILLED_BY_TWO if (capability, cached, D) == (86, "*i8", 256) else SPILLED,
        }
        ptx = compiled(flash_decoding._attend_share, capability, types | scales, **options, **constants).ptx
        joined = compiled(flash_decoding._join_shares, capability, {**found, "y_ptr": "*bf16"}, **shape).ptx
        assert "mma.sync" in ptx
        assert "cp.async" in ptx
        assert not overlap or accesses_before_waiting(ptx) == accesses_before_waiting(joined) == 0
