"""Names of the joint image-text spaces of CLIP weights."""

from __future__ import annotations

import re
from pathlib import Path

from zsseg_rt.common.files import sha256_of
from zsseg_rt.torch_files.shipped_clip import SPACE, is_shipped

# OpenAI's own archives, by the SHA-256 that their addresses contain.
_OPENAI_FILES = {
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af": "ViT-B-32",
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f": "ViT-B-16",
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836": "ViT-L-14",
    "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02": "ViT-L-14-336",
}
_SHOWN_DIGITS = 12


def describe_space(source: str | Path, architecture: str = "ViT-B-16") -> str:
    """Give the space of CLIP weights a human-readable name, to tell two spaces apart.

    Example:
        >>> describe_space("openai", "ViT-L-14-336"), describe_space("laion2b_s34b_b88k")
        ('OpenAI CLIP ViT-L/14@336px', 'CLIP ViT-B-16 laion2b_s34b_b88k')
    """
    path = Path(source)
    if is_shipped(source):
        return SPACE
    if path.is_file():
        digest = sha256_of(path)
        name = _OPENAI_FILES.get(digest)
        return _openai_name(name) if name else f"CLIP {_file_name(path, digest)}"
    if str(source) == "openai":
        return _openai_name(architecture.removesuffix("-quickgelu"))
    return f"CLIP {architecture} {source}"


def describe_rows(path: str | Path) -> str:
    """Name the space of embeddings in a file about which nothing else is known."""
    return f"rows of {_file_name(Path(path), sha256_of(Path(path)))}"


def _file_name(path: Path, digest: str) -> str:
    return f"{path.name} (SHA-256 {digest[:_SHOWN_DIGITS]})"


def _openai_name(architecture: str) -> str:
    """OpenAI's spelling of open_clip's name."""
    match = re.fullmatch(r"(ViT-\w)-(\d+)(?:-(\d+))?", architecture)
    if match is None:
        return f"OpenAI CLIP {architecture}"
    size, patch, side = match.groups()
    return f"OpenAI CLIP {size}/{patch}" + (f"@{side}px" if side else "")
