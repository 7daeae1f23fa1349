"""Transformer Engine as far as megatron-core's imports look: every module and class that is asked for, empty.

tests/docker/build.sh has it in the place of the real one, which no index has ready to install.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "1.12.0"  # of a newer one megatron-core 0.16.1 looks for signatures too


class Empty(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Empty(name, (), {})


class EmptyModule(ModuleType):
    __getattr__ = Empty.__getattr__


class Finder:
    """Finds every module below this one, and loads it empty."""

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.startswith(f"{__name__}.") else None  # type: ignore

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return EmptyModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


sys.meta_path.insert(0, Finder())  # type: ignore
sys.modules[__name__].__class__ = EmptyModule
