"""With this folder on `PYTHONPATH` torch sees the emulated CUDA device, in children too; nothing else is imported."""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class _AfterTorch(MetaPathFinder, Loader):
    """Loads torch as it is, then gives it the device."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name)
        if spec is not None:
            self._loader = spec.loader
            spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        assert self._loader is not None
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        import emulated_cuda

        emulated_cuda.load()
        assert self._loader is not None
        self._loader.exec_module(module)
        emulated_cuda.install()


sys.meta_path.insert(0, _AfterTorch())
