"""Every Triton kernel compiles for every chip, with registers and shared memory that the chip has. Needs Triton, but no GPU.

Those that compute products also run here, by Triton's interpreter; the others are compared on a GPU.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="needs Triton, which a CUDA build of torch brings along")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia import compiler as nvidia  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from training.engine.fast import triton_attention, triton_gradients, triton_group_norms, triton_kernels, triton_products  # noqa: E402

SHARED_BYTES = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 120: 99, 121: 99}
"""KiB of shared memory that a block may use, by compute capability times 10 (CUDA programming guide, "Technical Specifications
per Compute Capability")."""
REGISTERS = 65536
"""32-bit registers of a multiprocessor, on each of these chips; a thread has 255 at most."""
NUMBERS = {"width": "i32", "stride": "i32", "stride_of_d_total": "i32", "rows": "i32", "channels": "i32", "chunks": "i32"}
NUMBERS |= {
    "groups": "i32",
    "count": "i32",
    "eps": "fp32",
    "stride_of_h": "i32",
    "stride_of_g": "i32",
    "chunk": "i32",
    "stride_of_dy": "i32",
}
NUMBERS |= dict.fromkeys(
    ("rank", "stride_of_out", "stride_of_kept", "part_of_factors", "row_of_factors", "row_of_factor", "column_of_factors"), "i32"
)
NUMBERS |= dict.fromkeys(
    ("stride_of_plus", "keys", "heads", "stride_of_k", "stride_of_v", "stride_of_d_out", "stride_of_dq", "size_of_part"), "i32"
)
NUMBERS |= {"rank_in": "i32", "rank_out": "i32", "count_of_second": "i32", "pieces": "i32", "stride_of_dy": "i32"}
STATISTICS = ("mean", "rstd", "sums", "scale", "shift", "linear", "constant", "parts", "multipliers", "logs", "partial_sums")
"""Arguments that are fp32 in memory; all other arguments are in the dtype of the UNet."""
ROW, GROUPS = {"BLOCK": 2048}, {"R": 16, "C": 128}
LAUNCHES = {
    "_layer_norm_forward": [ROW | {"ADDS": adds} for adds in (False, True)],
    "_layer_norm_backward": [{"A": 1024, "B": 256, "ADDS": adds} for adds in (False, True)],
    "_geglu_forward": [{"BLOCK": triton_kernels._GEGLU}],
    "_geglu_backward": [{"BLOCK": triton_kernels._GEGLU}],
    "_group_sums": [{"R": 64, "C": 64, "BACKWARD": backward, "SILU": True} for backward in (False, True)],
    "_group_coefficients": [
        {"BACKWARD": backward, "PLUS": True, "P": triton_group_norms._PIECES, "G": triton_group_norms._GROUP}
        for backward in (False, True)
    ],
    "_group_apply": [GROUPS | {"BACKWARD": backward, "SILU": True, "ADDS": backward} for backward in (False, True)],
    "_add": [{"R": 16, "C": 128, "BIAS": has_bias} for has_bias in (False, True)],
    "_upsample": [{"R": 16, "C": 128, "BACKWARD": backward} for backward in (False, True)],
    "_add_gradients": [{"R": rank, "K": triton_gradients._ROWS, "C": triton_gradients._COLUMNS} for rank in (16, 32, 64)],
    "_scale_columns": [{"R": 16, "C": 128, "BIAS": has_bias} for has_bias in (False, True)],
    "_scale_columns_backward": [{"chunk": 128, "R": 16, "C": 128, "BIAS": has_bias} for has_bias in (False, True)],
    "_dequantize": [{"R": 4, "C": 1024}],
    "_geglu_backward_with_lora": [
        {"R_IN": rank, "R_OUT": rank, "K": triton_products._ROWS, "C": triton_products._COLUMNS} for rank in triton_products._WARPS
    ],
    "_append_products": [
        {"KEEPS": keeps, "R": rank, "K": triton_products._APPEND_ROWS, "C": triton_products._APPEND_COLUMNS}
        for keeps, rank in ((True, 16), (False, 32), (True, 64))
    ],
    "_geglu_forward_with_products": [
        {"R": rank, "K": triton_products._GEGLU_ROWS, "C": triton_products._GEGLU_COLUMNS} for rank in triton_products._WARPS
    ],
    "_attend": [{"D": 64, "A": a, "B": b, "K": triton_attention._ROWS} for a, b in ((64, 16), (64, 64), (128, 32))],
    "_attend_backward": [
        {"D": 64, "A": a, "B": b, "K": triton_attention._BACKWARD_ROWS} for a, b in ((64, 16), (64, 64), (128, 32))
    ],
    "_gradient_of_queries": [{"D": 64, "A": 128, "B": b, "K": triton_attention._ROWS} for b in (16, 32)],
    "_gradients_of_keys": [{"D": 64, "A": 128, "B": b, "K": triton_attention._ROWS} for b in (16, 32)],
    "_add_parts": [{"BLOCK": 1024}],
    "_add_up": [{"BLOCK": 1024}],
    "_copy_blocks": [{"R": 128, "C": 32}, {"R": 32, "C": 128}],
}
"""The compile-time arguments of each kernel at the widths of SDXL."""
_OF_ATTENTION = "chunk", "stride", "stride_of_k", "stride_of_v", "q", "k", "v"
ALIGNED = {
    "_geglu_backward_with_lora": ("width", "chunk", "projected", "d_out", "d_projected"),
    "_geglu_forward_with_products": ("width", "stride", "chunk", "projected", "out", "factor", "row_of_factor"),
    "_append_products": ("width", "stride", "stride_of_out", "first", "second", "third", "out", "factors"),
    "_group_apply": ("channels", "stride", "x", "dy", "d_x", "out"),
    "_attend": (*_OF_ATTENTION, "stride_of_out", "out"),
    "_attend_backward": (*_OF_ATTENTION, "stride_of_d_out", "stride_of_dq", "dq", "d_out"),
    "_gradient_of_queries": (*_OF_ATTENTION, "stride_of_d_out", "stride_of_dq", "dq", "d_out"),
    "_gradients_of_keys": (*_OF_ATTENTION, "stride_of_d_out", "d_out"),
}
"""Arguments that are multiples of 16 at these widths and ranks, which Triton finds out when it launches a kernel."""


def kernels() -> dict[str, JITFunction]:
    found = (
        vars(triton_attention) | vars(triton_gradients) | vars(triton_group_norms) | vars(triton_kernels) | vars(triton_products)
    )
    parts_of_others = ("_silu_slope", "geglu_gradients", "geglu_output", "_place", "_keys_and_values", "_store_gradients")
    return {name: each for name, each in found.items() if isinstance(each, JITFunction) and name not in parts_of_others}


def test_every_kernel_is_compiled_here():
    assert kernels().keys() == LAUNCHES.keys()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("chip", SHARED_BYTES)
@pytest.mark.parametrize("name", LAUNCHES)
def test_a_kernel_fits_a_chip(name, chip, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    dtype = triton.language.float16 if chip < 80 else triton.language.bfloat16
    kernel = kernels()[name]
    for constants in LAUNCHES[name]:
        if name == "_copy_blocks":
            constants = constants | {"ELEMENT": dtype}
        generation = "turing" if chip < 80 else "ampere"
        constants = {key: value[generation] if isinstance(value, dict) else value for key, value in constants.items()}
        types = {each: "constexpr" if each in constants else type_of(name, each, dtype.name) for each in kernel.arg_names}
        target = GPUTarget("cuda", chip, 32)
        options, multiples = {}, {}
        if name in ALIGNED:
            multiples = {(kernel.arg_names.index(each),): [["tt.divisibility", 16]] for each in ALIGNED[name]}
        if name == "_geglu_backward_with_lora":
            options = {"num_warps": triton_products._WARPS[constants["R_IN"]], "num_stages": triton_products._STAGES}
        elif name == "_geglu_forward_with_products":
            options = {"num_stages": triton_products._GEGLU_STAGES}
        elif name == "_append_products":
            options = {"num_stages": triton_products._APPEND_STAGES}
        elif name in vars(triton_attention):
            in_two = name in ("_gradient_of_queries", "_gradients_of_keys")
            if chip < 80 or (in_two and chip != 90):
                continue  # `ops.attend` is PyTorch's, and the backward is one kernel
            many = constants["A"] + constants["B"] > triton_attention._KEYS_OF_FOUR_WARPS and name == "_attend_backward"
            options = {"num_warps": 8 if many or name == "_gradients_of_keys" else 4, "num_stages": 3}
        elif name == "_layer_norm_backward":
            options = {"num_warps": 1}
        elif name == "_add_gradients":
            if chip < 80:
                continue  # `ops.takes_gradients` is false
            types["jobs"] = ((f"*{dtype.name}", f"*{dtype.name}", "*fp32", *["i32"] * 6, "fp32"),) * 8
            options = {"num_stages": triton_gradients._STAGES}
            multiples = {(0, job, number): [["tt.divisibility", 16]] for job in range(8) for number in range(9)}
        source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=multiples)
        compiled = triton.compile(source, target=target, options=options)
        assert compiled.metadata.shared <= SHARED_BYTES[chip] * 1024
        registers, spilled = resources(compiled.asm["cubin"], tmp_path)
        assert registers * 32 * compiled.metadata.num_warps <= REGISTERS
        assert registers <= 255
        # It was the fastest with these registers: a smaller tile is not multiplied by the whole warp group.
        assert spilled <= (128 if name == "_gradient_of_queries" else 0)


def test_products_are_those_of_pytorch():
    script = Path(__file__).with_name("interpreted_kernels.py")
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root / "scripts"), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, script], env=environment, check=True)


def type_of(kernel: str, argument: str, dtype: str) -> str:
    if kernel in vars(triton_attention) and argument == "scale":
        return "fp32"
    if kernel == "_add_parts" and argument in ("scale", "first", "second"):
        return "fp32" if argument == "scale" else "*fp32"
    if kernel == "_copy_blocks":
        return {"flat": "*fp32", "table": "*i64", "scale": "fp32"}[argument]
    if argument == "codes":
        return "*i8"
    if argument == "scales":
        return f"*{dtype}"
    return NUMBERS.get(argument) or ("*fp32" if argument in STATISTICS else f"*{dtype}")


def resources(code: bytes, folder: Path) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills to memory, in machine code."""
    file = folder / "kernel.cubin"
    file.write_bytes(code)
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    output = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|LOCAL|STACK):(\d+)", output))
    return int(usage["REG"]), int(usage["LOCAL"]) + int(usage["STACK"])
