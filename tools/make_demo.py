"""Make what ``--demo`` of segment and train uses from scratch: small CLIP, bundle, images.

``python tools/make_demo.py --work RUNS`` takes more than an hour on one core. An interrupted call
continues from its last checkpoint.
"""

import sys
from pathlib import Path

# Beside this file is profile.py, which must not be taken for Python's own module of that name.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]

import argparse
import logging

import torch

from zsseg_rt.evaluation.provenance import describe_commit
from zsseg_rt.experiments.clip_pretraining import pretrain
from zsseg_rt.experiments.demo_rule import choose_rule
from zsseg_rt.experiments.make_demo import DemoConfig, evaluate_demo, train_demo, write_demo
from zsseg_rt.experiments.packed_clip import pack_clip
from zsseg_rt.experiments.small_clip import PretrainingConfig

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Read the command line and do everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the two runs")
    parser.add_argument("--out", type=Path, default=ROOT / "zsseg_rt" / "demo")
    parser.add_argument(
        "--clip-out", type=Path, default=ROOT / "zsseg_rt" / "models" / "clip" / "demo.safetensors"
    )
    parser.add_argument("--clip-steps", type=int, default=PretrainingConfig.steps)
    parser.add_argument(
        "--clip", help="weights to use instead of training CLIP; 'demo': the shipped ones"
    )
    parser.add_argument("--iterations", type=int, default=DemoConfig.iterations)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="threads for torch")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("zsseg_rt").setLevel(logging.INFO)  # not the exporter's notes
    torch.set_num_threads(arguments.threads)
    clip = arguments.clip or pretrain(
        PretrainingConfig(steps=arguments.clip_steps, seed=arguments.seed), arguments.work / "clip"
    )
    config = DemoConfig(iterations=arguments.iterations, seed=arguments.seed)
    model = train_demo(clip, config, arguments.work / "zegclip", resume=True)
    chosen = choose_rule(clip, config, arguments.work / "settings")
    if chosen is None:
        raise SystemExit("stopped; the same command continues")
    print(chosen.described)
    for zoom in (1, 2):
        print(f"zoom {zoom}:", evaluate_demo(chosen.apply(model), zoom=zoom).scores)
    if arguments.clip is None:
        print(pack_clip(clip, arguments.clip_out))
    commit = describe_commit(ROOT)
    print(write_demo(model, clip, config, arguments.out, chosen=chosen, commit=commit))


if __name__ == "__main__":
    main()
