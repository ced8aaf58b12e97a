"""Patches for Triton's interpreter (TRITON_INTERPRET=1), applied by `launch.py` for tests without a GPU.

- bfloat16: it truncates where the GPU rounds, and multiplies the bits as integers.
- int() of a scalar: fails in Triton 3.6 with NumPy 2.4 and later.
- Speed: it patches the language again for every function that a kernel calls, a third of its time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def repair() -> None:
    """Patches methods and functions of the interpreter; idempotent."""
    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "fusedrnn_repaired", False):
        return
    builder.fusedrnn_repaired = True
    cast, dot = builder.cast_impl, builder.create_dot
    patch_of_tensor, patch_of_language = interpreter._patch_lang_tensor, interpreter._patch_lang
    scopes: dict[int, Any] = {}  # of the launch that is running, by the globals of the functions they were made for

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
        patch_of_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def patch_language(fn: Any) -> Any:
        if id(fn.__globals__) in scopes:
            return interpreter._LangPatchScope()  # in which nothing has been replaced
        scope: Any = patch_of_language(fn)
        if not scopes:  # of the kernel: it ends with the launch, and those of functions with it
            scope.restore = partial(end_launch, scope.restore)
        scopes[id(fn.__globals__)] = scope
        return scope

    def end_launch(restore: Callable[[], None]) -> None:
        for nested in reversed([*scopes.values()][1:]):
            nested.restore()
        scopes.clear()
        restore()

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    interpreter._patch_lang_tensor, interpreter._patch_lang = patch_tensor, patch_language
