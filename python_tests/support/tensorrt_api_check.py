"""Which attributes of TensorRT the backend uses, and which of them an imported module lacks.

Run as a script in a process of its own: ``tensorrt_api_check.py MODULE FILE...`` imports MODULE
and prints its version, then the missing attributes, one a line. An attribute is used where an
expression whose last name is in :data:`KINDS` is followed by a dot; a use is optional in a function
that asks ``hasattr`` for it, or if it belongs to :data:`RTX_ONLY`, which only RTX needs.
"""

import ast
import importlib
import sys
from pathlib import Path

# how the backend calls its objects -> the TensorRT class
KINDS = {
    "trt": "",
    "module": "",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "parser": "OnnxParser",
    "error": "ParserError",
    "layer": "ILayer",
    "tensor": "ITensor",
    "serialized": "IHostMemory",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
    "cache": "ITimingCache",
    "runtime_config": "IRuntimeConfig",
    "kernels": "IRuntimeCache",
}
RTX_ONLY = (
    "ComputeCapability",
    "CudaGraphStrategy",
    "ICudaEngine.create_runtime_config",
    "IRuntimeCache",
    "IRuntimeConfig",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
)


def used_attributes(source):
    """Return the dotted names of TensorRT attributes a source text uses without asking first."""
    found = set()
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef):
            asked = _asked_for(function)
            found |= {name for name in _dotted(function) if name.split(".")[-1] not in asked}
    return found


def missing(module, names):
    """Return the names a module lacks; a class that is absent counts once, by its own name."""
    lacking = set()
    for name in names:
        place = module
        for part in name.split("."):
            if not hasattr(place, part):
                lacking.add(name)
                break
            place = getattr(place, part)
    return lacking


def _asked_for(function):
    return {
        node.args[1].value
        for node in ast.walk(function)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "hasattr"
        and isinstance(node.args[1], ast.Constant)
    }


def _dotted(function):
    """Longest chains such as ``trt.ILogger.Severity.ERROR`` and ``engine.num_io_tensors``."""
    inner = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            chain, root = _chain(node, inner)
            if root is not None and chain:
                yield ".".join(([KINDS[root]] if KINDS[root] else []) + chain)


def _chain(node, inner):
    """The attributes after the last name that is in KINDS, and that name."""
    parts = []
    while isinstance(node, ast.Attribute):
        inner.add(id(node))
        if _kind(node.attr) and parts:
            break
        parts.insert(0, node.attr)
        node = node.value
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    root = _kind(name)
    # a class has attributes of its own, an object's attribute has not: builder.logger.x stops here
    return (parts if root is not None and not KINDS[root] else parts[:1]), root


def _kind(name):
    bare = name.lstrip("_")
    return bare if bare in KINDS else None


def main():
    """Import a module and print what it lacks."""
    module = importlib.import_module(sys.argv[1])
    names = set()
    for path in sys.argv[2:]:
        names |= used_attributes(Path(path).read_text(encoding="utf-8"))
    if "rtx" not in sys.argv[1]:
        names = {name for name in names if not name.startswith(RTX_ONLY)}
    print(module.__version__)
    print("\n".join(sorted(missing(module, names))))


if __name__ == "__main__":
    main()
