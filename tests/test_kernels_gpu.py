"""The GPU's kernels: `gpu_checks.py` in Triton's interpreter and on a GPU, and what the compiler makes of them.

    python -m pytest tests/test_kernels_gpu.py

Worth knowing: Triton brings NVIDIA's assembler along, so that kernels are compiled for a GPU where there is none.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs the package triton")
CHECKS = Path(__file__).with_name("gpu_checks.py")
QUANTIZED = {4: ("*u8", "*bf16"), 8: ("*i8", "*fp32")}  # bits -> types of weights and scales


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
    """Here the tensors are on a CPU, from which no launch succeeds."""
    from kernels import gpu

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    reason = gpu.missing.__wrapped__("cpu", torch.bfloat16)
    assert re.fullmatch(r"a GPU's kernels fail on NVIDIA H100: \w+Error: .+", reason)


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """`compiled(kernel, capability, warps, types, **constants)`: its PTX.

    More than two spilled registers are an error, and more shared memory than a program can have.
    Pointers are to multiples of 16 bytes; what has no type and is no constant is an integer.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def make(kernel, capability: int, warps: int, types: dict[str, str], **constants: int | None) -> str:
        names = kernel.arg_names
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"}
        source = ASTSource(kernel, signature, constants, aligned)
        built = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        assert built.metadata.shared <= {80: 163, 86: 99, 90: 227}[capability] * 1024
        binary = tmp_path / "kernel.cubin"
        binary.write_bytes(built.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run(
            [tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True
        ).stdout
        stack, local = re.search(r"STACK:(\d+) .* LOCAL:(\d+) ", usage).groups()
        assert int(stack) <= 8, usage
        assert local == "0", usage
        return built.asm["ptx"]

    return make


def surroundings(*present: str) -> tuple[dict[str, str], dict[str, None]]:
    """Types and constants of the kernels' arguments for what surrounds a product."""
    names = {"bias_ptr", "norm_ptr", "residual_ptr"}
    return dict.fromkeys(present, "*bf16"), dict.fromkeys(names.difference(present))


@pytest.mark.parametrize(
    ("capability", "bits", "rows", "present", "gated"),
    [
        (80, 4, 1, ("norm_ptr",), 2),
        (90, 4, 1, ("residual_ptr",), 1),
        (90, 4, 2, ("norm_ptr", "bias_ptr"), 1),
        (90, 4, 4, ("residual_ptr",), 1),
        (80, 8, 2, ("norm_ptr",), 2),
        (90, 8, 2, (), 1),
    ],
)
def test_few_rows_load_16_bytes_and_exchange_no_weights(compiled, capability, bits, rows, present, gated):
    from kernels import gpu

    weights, scales = "*i32", QUANTIZED[bits][1]
    types = {"x_ptr": "*bf16", "words_ptr": weights, "scales_ptr": scales, "zeros_ptr": scales, "y_ptr": "*bf16"}
    more, absent = surroundings(*present)
    shape = {"n_chunks": 4096 * bits // 128, "BITS": bits, "GROUP": 32, "ROWS": rows, "BLOCK_N": 4, "CHUNKS": 128}
    types |= more | {"eps": "fp32"}
    ptx = compiled(gpu._multiply_few, capability, 4, types, **shape, **absent, GATED=gated)
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) >= 4  # one for each of a program's outputs
    sums = (4 + ("norm_ptr" in present)) * rows
    assert len(re.findall("bar.sync", ptx)) <= 3 * sums  # the last ones; a layout that does not fit takes more


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("rows", "gated", "present"), [(1, 2, ("norm_ptr",)), (2, 1, ("residual_ptr", "bias_ptr"))])
def test_few_rows_of_float_weights_load_16_bytes(compiled, capability, rows, gated, present):
    from kernels import gpu

    types = dict.fromkeys(("x_ptr", "weight_ptr", "y_ptr"), "*bf16") | {"eps": "fp32"}
    more, absent = surroundings(*present)
    shape = {"n_in": 4096, "GATED": gated, "ROWS": rows, "BLOCK_N": 4, "BLOCK_K": 1024}
    ptx = compiled(gpu._multiply_float, capability, 4, types | more, **shape, **absent)
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) >= 4 + rows


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("bits", [4, 8])
def test_more_rows_run_on_the_tensor_cores(compiled, capability, bits):
    from kernels import gpu

    weights, scales = QUANTIZED[bits]
    types = {"x_ptr": "*bf16", "weight_ptr": weights, "scales_ptr": scales, "zeros_ptr": scales, "y_ptr": "*bf16"}
    shape, tiles = {"n_in": 4096, "BITS": bits, "GROUP": 32}, {"BLOCK_N": 16, "BLOCK_K": 128, "SPLITS": 8}
    for gated, present in ((1, ("residual_ptr",)), (2, ("bias_ptr",))):
        more, absent = surroundings(*present)
        del absent["norm_ptr"]
        ptx = compiled(gpu._multiply_more, capability, 8, types | more, **shape, **tiles, **absent, GATED=gated)
        assert "mma.sync" in ptx
        assert re.search(r"cp\.async\.cg\.shared\.global .* 0x10,", ptx)
    types = {"weight_ptr": weights, "scales_ptr": scales, "zeros_ptr": scales, "w_ptr": "*bf16"}
    assert "st.global.v4" in compiled(gpu._dequantize, capability, 4, types, **shape, BLOCK_N=16, BLOCK_K=256)


@pytest.mark.parametrize(
    ("capability", "cached", "heads", "S"),
    [
        (80, "*bf16", 4, 1), (90, "*bf16", 4, 1), (86, "*bf16", 8, 16), (86, "*i8", 8, 16), (80, "*i8", 4, 1),
        (90, "*i8", 4, 1), (90, "*i8", 4, 6), (90, "*fp8e4nv", 4, 1),
    ],
)  # fmt: skip
def test_attention_runs_on_the_tensor_cores(compiled, capability, cached, heads, S):
    from kernels import gpu_attention

    found, rows = {"sums_ptr": "*fp32", "peaks_ptr": "*fp32", "totals_ptr": "*fp32"}, heads * S
    types = dict.fromkeys(("qkv_ptr", "q_norm_ptr", "k_norm_ptr"), "*bf16") | dict.fromkeys(("k_ptr", "v_ptr"), cached)
    types |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "positions_ptr": "*i64", "scale": "fp32", "eps": "fp32", **found}
    shape = {"KV": 8, "HEADS": heads, "D": 128, "BLOCK_D": 128, "SPLITS": 64, **({"S": 1} if S == 1 else {})}
    blocks = {"ROWS": max(16, triton.next_power_of_2(rows)), "NEW": 16, "BLOCK_HALF": 64, "BLOCK": 64}
    scales = dict.fromkeys(("k_scales_ptr", "v_scales_ptr"), None if cached == "*bf16" else "*fp32")
    constants = {**shape, **blocks, "WINDOW": 0, **(scales if cached == "*bf16" else {})}
    kernel, warps = gpu_attention._attend_share, 4 if rows <= 32 else 8
    ptx = compiled(kernel, capability, warps, types | scales, **constants)
    assert "mma.sync" in ptx
    assert "cp.async" in ptx
    compiled(gpu_attention._join_shares, capability, 4, {**found, "y_ptr": "*bf16"}, **shape)
