"""ONNX Runtime: which processor runs the model, with how many threads, and what goes wrong, in our words."""

from collections.abc import Sequence
from pathlib import Path

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from captioning.tags_file import FETCH_AGAIN
from errors import ModelError, SettingsError

ORT_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoModel,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)
_ONLY_FATAL = 4
_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def open_session(
    model: Path, provider: str, bf16: bool = False, threads: int = 0, cores: Sequence[set[int]] = ()
) -> onnxruntime.InferenceSession:
    """The model, ready to run. `provider` is "auto", "cpu" or "cuda"; "auto" takes CUDA if the installed runtime has it.

    `bf16` lets matrix products on ARM CPUs round their factors to bfloat16. With `cores` (see cores.big_cores) there is a
    thread for each, and it stays there: on the first one the thread that runs the session, which is for the caller to see to.
    Without, there are as many as `threads`; 0 is ONNX Runtime's own choice, one for each physical core.
    Raises ModelError for a file that is no model, SettingsError for CUDA that is not there.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ONLY_FATAL  # errors are raised, and said in our words
    options.intra_op_num_threads = len(cores) or threads
    if len(cores) > 1:
        options.add_session_config_entry("session.intra_op_thread_affinities", _affinities(cores[1:]))
    if bf16:
        options.add_session_config_entry("mlas.enable_gemm_fastmath_arm64_bfloat16", "1")
    try:
        session = onnxruntime.InferenceSession(model, options, providers=_providers(provider))
    except ORT_ERRORS as error:
        raise ModelError(f"{model}: is cut off or no ONNX model ({one_line(error)}); {FETCH_AGAIN}") from None
    if provider == "cuda" and _CUDA not in session.get_providers():
        raise SettingsError("caption_provider: cuda does not start here (no GPU, or no CUDA and cuDNN libraries); set it to cpu")
    return session


def runs_on(session: onnxruntime.InferenceSession) -> str:
    """`CUDA` or `CPU`, for the log."""
    return "CUDA" if _CUDA in session.get_providers() else "CPU"


def one_line(error: Exception) -> str:
    """The message without its line breaks."""
    return " ".join(str(error).split())


def _affinities(cores: Sequence[set[int]]) -> str:
    """One entry per thread, in ONNX Runtime's numbers of processors, which begin at 1."""
    return ";".join(",".join(str(cpu + 1) for cpu in sorted(core)) for core in cores)


def _providers(provider: str) -> list[str]:
    has_cuda = _CUDA in onnxruntime.get_available_providers()
    if provider == "cuda" and not has_cuda:
        raise SettingsError(
            "caption_provider: cuda needs the package onnxruntime-gpu, and onnxruntime without a GPU is installed; "
            "set it to cpu, or install onnxruntime-gpu in its place"
        )
    if provider == "cpu" or not has_cuda:
        return [_CPU]
    onnxruntime.preload_dlls()  # finds the CUDA libraries that pip installed
    return [_CUDA, _CPU]
