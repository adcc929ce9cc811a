"""Matrix products by NVIDIA's cuBLASLt with the epilogues that torch does not offer.

A GELU in the product's epilogue, its derivative in the epilogue of the product behind it, and bias gradients taken on the way
save passes over the widest activations. torch ships the library; it is called through its C interface, so nothing is compiled.
Numbers and meanings: cublasLt.h and "Using the cuBLASLt API" in NVIDIA's cuBLAS documentation.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from itertools import pairwise

import torch

DEFAULT, BIAS, GELU_AUX_BIAS, DGELU = 1, 4, 164, 192
"""Epilogues: none; + bias; + bias, then GELU in its tanh form, with the GELU's input kept in `aux`; times GELU' at `aux`.

Those that also sum a bias gradient cost more than a pass of its own: DGELU_BGRAD 1.74 ms instead of 0.60, BGRADA 0.49 instead
of 0.35 and 0.11 (H100, docs/results.md)."""

_DTYPES = {torch.float32: 0, torch.bfloat16: 14}
_COMPUTE_FP32 = 68
_DESC_TRANSA, _DESC_TRANSB, _DESC_EPILOGUE, _DESC_BIAS, _DESC_AUX, _DESC_AUX_LD = 3, 4, 7, 8, 11, 12
_PREFERENCE_MAX_WORKSPACE = 1
_WORKSPACE_BYTES = 32 << 20
"""What NVIDIA recommends for Hopper."""

_CANDIDATES, _TRIALS = 8, 7
"""Algorithms to try, and how often each. The library's first guess is 2 to 13% slower than its best for GPT-2's shapes
(docs/results.md)."""


class CublasLtError(RuntimeError):
    """The library refused; it has no algorithm for this product on this card, most likely."""


class _HeuristicResult(ctypes.Structure):
    _fields_ = [
        ("algorithm", c_uint64 * 8),
        ("workspace_bytes", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


@cache
def _library() -> ctypes.PyDLL:
    """The copy that torch has loaded, with a handle; PyDLL, because the calls are too short to let other threads in."""
    if torch.version.cuda is None:
        raise CublasLtError("torch was built without CUDA")
    return ctypes.PyDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")


def _call(name: str, *arguments) -> None:
    status = getattr(_library(), name)(*arguments)
    if status:
        raise CublasLtError(f"{name} failed with status {status}")


@cache
def _handle() -> c_void_p:
    handle = c_void_p()
    _call("cublasLtCreate", byref(handle))
    return handle


@cache
def _workspace(device: torch.device) -> torch.Tensor:
    # One buffer is enough: all products of a device run on one stream.
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


class _Product:
    """Descriptors and algorithm of one kind of product; pointers come with each call."""

    def __init__(self, m: int, n: int, k: int, a: tuple[bool, int], b: tuple[bool, int], epilogue: int, dtype: torch.dtype):
        # Column-major, as the library counts, the row-major out = a @ b is out.T = b.T @ a.T: b comes first.
        def layout(rows: int, columns: int, stride: int) -> c_void_p:
            result = c_void_p()
            _call(
                "cublasLtMatrixLayoutCreate", byref(result), c_int(_DTYPES[dtype]), c_uint64(rows), c_uint64(columns),
                c_int64(stride),
            )  # fmt: skip
            return result

        (a_transposed, a_stride), (b_transposed, b_stride) = a, b
        self.first = layout(*((k, n) if b_transposed else (n, k)), b_stride)
        self.second = layout(*((m, k) if a_transposed else (k, m)), a_stride)
        self.out = layout(n, m, n)
        self.operation = c_void_p()
        _call("cublasLtMatmulDescCreate", byref(self.operation), c_int(_COMPUTE_FP32), c_int(_DTYPES[torch.float32]))
        self._set(_DESC_TRANSA, c_int32(b_transposed))
        self._set(_DESC_TRANSB, c_int32(a_transposed))
        self._set(_DESC_EPILOGUE, c_uint32(epilogue))
        if epilogue in (GELU_AUX_BIAS, DGELU):
            self._set(_DESC_AUX_LD, c_int64(n))
        self.algorithm: ctypes.Array | None = None
        """The fastest, once a first call has found it."""

    def _set(self, attribute: int, value) -> None:
        _call("cublasLtMatmulDescSetAttribute", self.operation, c_int(attribute), byref(value), c_size_t(ctypes.sizeof(value)))

    def candidates(self) -> list[ctypes.Array]:
        """The library's guesses at the fastest algorithm, best first."""
        most = _CANDIDATES
        preference = c_void_p()
        _call("cublasLtMatmulPreferenceCreate", byref(preference))
        size = c_uint64(_WORKSPACE_BYTES)
        _call("cublasLtMatmulPreferenceSetAttribute", preference, c_int(_PREFERENCE_MAX_WORKSPACE), byref(size), c_size_t(8))
        results, count = (_HeuristicResult * most)(), c_int()
        try:
            _call(
                "cublasLtMatmulAlgoGetHeuristic", _handle(), self.operation, self.first, self.second, self.out, self.out,
                preference, c_int(most), results, byref(count),
            )  # fmt: skip
        finally:
            _library().cublasLtMatmulPreferenceDestroy(preference)
        return [result.algorithm for result in results[: count.value] if result.status == 0]

    def point(self, bias: torch.Tensor | None, aux: torch.Tensor | None) -> None:
        """Name the tensors of the epilogue."""
        if bias is not None:
            self._set(_DESC_BIAS, c_void_p(bias.data_ptr()))
        if aux is not None:
            self._set(_DESC_AUX, c_void_p(aux.data_ptr()))

    def run(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, algorithm: ctypes.Array) -> None:
        _call(
            "cublasLtMatmul", _handle(), self.operation, byref(c_float(1.0)), c_void_p(b.data_ptr()), self.first,
            c_void_p(a.data_ptr()), self.second, byref(c_float(0.0)), c_void_p(out.data_ptr()), self.out,
            c_void_p(out.data_ptr()), self.out, byref(algorithm), c_void_p(_workspace(out.device).data_ptr()),
            c_size_t(_WORKSPACE_BYTES), c_void_p(torch.cuda.current_stream(out.device).cuda_stream),
        )  # fmt: skip

    def fastest(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> ctypes.Array | None:
        """The fastest candidate, measured on the tensors of the first call; None if there is none. Overwrites `out`."""
        best, best_ms = None, float("inf")
        for algorithm in self.candidates():
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(_TRIALS + 2)]
            for mark in marks[:-1]:
                mark.record()
                self.run(a, b, out, algorithm)
            marks[-1].record()
            marks[-1].synchronize()
            # The first run warms up.
            ms = sorted(start.elapsed_time(end) for start, end in pairwise(marks[1:]))[_TRIALS // 2]
            if ms < best_ms:
                best, best_ms = algorithm, ms
        return best


_product = cache(_Product)


def _orientation(matrix: torch.Tensor) -> tuple[bool, int]:
    """Whether a matrix is the transpose of a row-major one, and that one's row stride."""
    if matrix.stride(1) == 1:
        return False, matrix.stride(0)
    if matrix.stride(0) == 1:
        return True, matrix.stride(1)
    raise ValueError(f"a matrix with strides {matrix.stride()} is neither row-major nor its transpose")


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    epilogue: int = DEFAULT,
    bias: torch.Tensor | None = None,
    aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """a @ b and the epilogue, [m, n], on the current stream. The first product of a kind also looks for its fastest algorithm,
    which waits for the device.

    Args:
        a, b: [m, k] and [k, n] of one dtype, row-major or the transpose of row-major matrices.
        bias: [n], for BIAS and GELU_AUX_BIAS.
        aux: [m, n], contiguous, written by GELU_AUX_BIAS, read by DGELU.
    Raises:
        CublasLtError: if the library has no algorithm for it.
    """
    (m, k), n = a.shape, b.shape[1]
    out = a.new_empty(m, n)
    plan = _product(m, n, k, _orientation(a), _orientation(b), epilogue, a.dtype)
    plan.point(bias, aux)
    if plan.algorithm is None:
        plan.algorithm = plan.fastest(a, b, out)
    if plan.algorithm is None:
        raise CublasLtError(f"no algorithm for [{m}, {k}] @ [{k}, {n}] with epilogue {epilogue}")
    plan.run(a, b, out, plan.algorithm)
    return out


@cache
def available(device: torch.device) -> bool:
    """Whether the library is there and has every epilogue for bf16 on this GPU."""
    try:
        x = torch.zeros(128, 128, dtype=torch.bfloat16, device=device)
        product(x, x, BIAS, x[0])
        product(x, x, GELU_AUX_BIAS, x[0], torch.empty_like(x))
        product(x, x.T, DGELU, aux=x)
    except (CublasLtError, OSError, AttributeError):
        return False
    return True
