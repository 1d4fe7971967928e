"""A training run of seconds on the synthetic world, to spoil and to kill."""

from __future__ import annotations

from pathlib import Path

from tools.torture.target import test_support


def write_settings(folder: Path, *, iterations: int = 2, interval: int = 2) -> Path:
    """Write a tiny CLIP and the settings of a run that uses it; returns the TOML file."""
    from zsseg_rt.training.config import TrainConfig

    folder.mkdir(parents=True, exist_ok=True)
    small_runs = test_support("small_runs")
    clip = small_runs.save_clip(folder / "clip.safetensors")
    options = {"pretrained": str(clip), "activation": "quick_gelu", "image_size": 64}
    options |= {"num_prompts": 2}
    loop = {**small_runs.TABLES["loop"], "iterations": iterations, "checkpoint_interval": interval}
    tables = {
        **small_runs.TABLES,
        "loop": loop,
        "evaluation": {"limit": 2},
        "model": {"architecture": "zegclip", "options": options},
        "output": {"folder": str(folder / "run")},
    }
    path = folder / "small.toml"
    path.write_text(TrainConfig.from_dict(tables).to_toml())
    return path


def train_small(folder: Path) -> Path:
    """Train it; returns the run's folder."""
    from zsseg_rt.training.assembly import train
    from zsseg_rt.training.config import TrainConfig

    train(TrainConfig.load(write_settings(folder)))
    return folder / "run"
