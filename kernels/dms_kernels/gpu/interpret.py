"""Repairs of Triton 3.6's interpreter, so that it computes what a device does.  Compiled kernels are not touched.

A loaded scalar is an array of one element, and NumPy 2.4 refuses ``int`` of it, so a loop could not end at a loaded
number.  bfloat16 is held as uint16: ``tl.dot`` multiplied those integers, float32 was cut off, not rounded, and int8
became bits.  A dot over fewer than 16 columns, which no device takes, passed.
"""

import numpy as np
import triton
import triton.language as tl


def repair() -> None:
    """Calling it again does no harm."""
    if not triton.knobs.runtime.interpret:
        return
    from triton.runtime import interpreter

    builder, patch = interpreter.InterpreterBuilder, getattr(interpreter, "_patch_lang_tensor", None)
    if patch is None or hasattr(builder, "repaired"):
        return
    dot, cast, handle = builder.create_dot, builder.cast_impl, interpreter.TensorHandle

    def patch_and_allow_loaded_bounds(tensor, scope):
        patch(tensor, scope)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).item())

    def widened(x):
        if x.dtype.scalar != tl.bfloat16 or x.data.dtype != np.uint16:
            return x
        return handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounding_cast(self, x, to):
        if x.dtype.scalar in (tl.float32, tl.int8) and to.scalar == tl.bfloat16:
            return handle(_nearest_bfloat16(np.asarray(x.data)), tl.bfloat16)
        return cast(self, x, to)

    interpreter._patch_lang_tensor = patch_and_allow_loaded_bounds
    builder.create_dot = lambda self, a, b, *args: dot(self, widened(a), widened(b), *args)
    builder.cast_impl = rounding_cast
    interpreter.interpreter_builder.codegen_fns["min_dot_size"] = lambda left, right: (1, 1, 16)
    builder.repaired = True


def _nearest_bfloat16(x: np.ndarray) -> np.ndarray:
    """Bits of float32 numbers rounded to bfloat16, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).reshape(x.shape)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), bits >> 16, rounded).astype(np.uint16)
