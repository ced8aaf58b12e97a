"""Triton's interpreter: bfloat16, which it cuts off where the GPU rounds and multiplies as the integers of its bits;
and the integer that Python asks of a scalar, which the one of Triton 3.6 cannot give with NumPy 2.4 and later.

`launch.py` puts this right where the interpreter is in use (TRITON_INTERPRET=1): tests, on a machine without a GPU.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def repair() -> None:
    """Replaces two methods of the interpreter, and one that it gives to tensors; a second time, it changes nothing."""
    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "fusedrnn_repaired", False):
        return
    builder.fusedrnn_repaired = True
    cast, dot, patch = builder.cast_impl, builder.create_dot, interpreter._patch_lang_tensor

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        kinds = (src.dtype.scalar, dst_type.scalar)
        if kinds == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.array(src.data)).to(torch.bfloat16).view(torch.int16).numpy()
            return interpreter.TensorHandle(rounded.view(np.uint16), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            widened = src.data.astype(np.uint32) << np.uint32(16)
            return interpreter.TensorHandle(widened.view(np.float32), tl.float32)
        return cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (self.cast_impl(s, tl.float32) if s.dtype.scalar == tl.bfloat16 else s for s in (a, b))
        return dot(self, a, b, *rest)

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    interpreter._patch_lang_tensor = patch_tensor
