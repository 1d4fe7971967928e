"""Another build of the core: the one whose CUDA is an emulated GPU."""

import importlib.util
import sys


def use_extension(path: str) -> None:
    """Put the extension module at ``path`` in the place of the installed ``zsseg_rt._C``."""
    spec = importlib.util.spec_from_file_location("zsseg_rt._C", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"ZSSEG_EXTENSION: expected an extension module, got {path}")
    sys.modules["zsseg_rt._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["zsseg_rt._C"])
