"""torchvision without torch's compiler.

torchvision imports ``torch._dynamo`` for one function, which it asks only while something is compiled: 150 MB and more
than a second, the largest part of a start-up, for nothing. Here a module with that function alone stands in for it
while torchvision is imported; the function imports the real one when it is asked.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo.utils"


def _is_compile_supported(*arguments: Any) -> Any:
    return importlib.import_module(_COMPILER).is_compile_supported(*arguments)


def _import_torchvision() -> ModuleType:
    if _COMPILER in sys.modules or "torchvision" in sys.modules:
        return importlib.import_module("torchvision")
    stand_in = sys.modules[_COMPILER] = ModuleType(_COMPILER)
    stand_in.is_compile_supported = _is_compile_supported
    try:
        return importlib.import_module("torchvision")
    finally:
        del sys.modules[_COMPILER]


torchvision = _import_torchvision()
