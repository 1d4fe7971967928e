"""Make what ``--demo`` of segment and train uses from scratch, or measure the bundle that ships.

``python tools/make_demo.py --work RUNS`` makes small CLIP, bundle and images. It takes more than an
hour on one core; an interrupted call continues from its last checkpoint.

``python tools/make_demo.py --evaluate-draws 12`` measures the bundle on other unseen names.
"""

import sys
from pathlib import Path

# Beside this file is profile.py, which must not be taken for Python's own module of that name.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import logging

from zsseg_rt.common.files import write_whole
from zsseg_rt.demo import DEMOS
from zsseg_rt.evaluation.provenance import describe_commit

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Read the command line and make the demo, or measure one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder for the two runs")
    parser.add_argument("--out", type=Path, default=ROOT / "zsseg_rt" / "demo")
    parser.add_argument(
        "--clip-out", type=Path, default=ROOT / "zsseg_rt" / "models" / "clip" / "demo.safetensors"
    )
    parser.add_argument("--clip-steps", type=int, help="of training CLIP")
    parser.add_argument(
        "--clip", help="weights to use instead of training CLIP; 'demo': the shipped ones"
    )
    parser.add_argument("--seed", type=int, default=0)
    own = {"default": argparse.SUPPRESS}  # DemoConfig has the defaults
    parser.add_argument("--iterations", type=int, **own)
    parser.add_argument("--split", help="train, or train_seen", **own)
    parser.add_argument("--start", help="the decoder's initial weights", **own)
    parser.add_argument("--start-offset", type=float, **own)
    parser.add_argument("--seen-bias", type=float, **own)
    parser.add_argument("--threads", type=int, default=1, help="threads for torch")
    add_measures(parser)
    arguments = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("zsseg_rt").setLevel(logging.INFO)  # not the exporter's notes
    if arguments.evaluate_draws:
        measure(arguments)
    elif arguments.work is None:
        parser.error("--work: expected a folder, got none")
    else:
        make(arguments)


def add_measures(parser: argparse.ArgumentParser) -> None:
    """Options that measure the bundle in ``--out`` instead of making one."""
    parser.add_argument(
        "--evaluate-draws", type=int, default=0, metavar="N", help="N draws of other unseen names"
    )
    parser.add_argument("--first-draw", type=int, default=0, help="number of the first draw")
    parser.add_argument("--length", type=int, default=300, help="scenes of each")
    parser.add_argument("--json", type=Path, help="file for the record")


def measure(arguments: argparse.Namespace) -> None:
    """Measure the bundle and print what belongs beside its figures."""
    from tools.studies.name_draws import measure_bundle

    first = arguments.first_draw
    record = measure_bundle(
        arguments.out / DEMOS["scenes"].bundle,
        draws=range(first, first + arguments.evaluate_draws),
        length=arguments.length,
        root=ROOT,
    )
    for kind, figures in record["summary"].items():
        for name, spread in figures.items():
            print(
                f"{kind:9} {name:20} {spread['mean']:5.1f} ± {spread['sd']:.1f}"
                f"  ({spread['least']:.1f} to {spread['most']:.1f})"
            )
    if arguments.json is not None:
        write_whole(arguments.json, (json.dumps(record, indent=1) + "\n").encode())


def make(arguments: argparse.Namespace) -> None:
    """Make CLIP, bundle and images."""
    import torch

    from tools.studies.clip_pretraining import pretrain
    from tools.studies.make_demo import DemoConfig, evaluate_demo, train_demo, write_demo
    from tools.studies.packed_clip import pack_clip
    from tools.studies.small_clip import PretrainingConfig

    torch.set_num_threads(arguments.threads)
    steps = arguments.clip_steps or PretrainingConfig.steps
    clip = arguments.clip or pretrain(
        PretrainingConfig(steps=steps, seed=arguments.seed), arguments.work / "clip"
    )
    names = DemoConfig.__dataclass_fields__.keys() & vars(arguments).keys()
    config = DemoConfig(**{name: getattr(arguments, name) for name in names})
    model = train_demo(clip, config, arguments.work / "zegclip", resume=True)
    for zoom in (1, 2):
        print(f"zoom {zoom}:", evaluate_demo(model, zoom=zoom).scores)
    if arguments.clip is None:
        print(pack_clip(clip, arguments.clip_out))
    print(write_demo(model, clip, config, arguments.out, commit=describe_commit(ROOT)))


if __name__ == "__main__":
    main()
