"""Write the synthetic world as a folder data set: images/, masks/ and classes.txt.

python -m tools.scenes scenes                        # 2400 scenes to train on, 300 to judge by
python -m tools.scenes scenes --split train_seen --length 20000
zsseg-rt evaluate BUNDLE --dataset folder --root scenes --split val
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.scenes.folder import LENGTHS, write_folder
from zsseg_rt.errors import ZssegError


def main(arguments: list[str] | None = None) -> int:
    """Write the splits that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m tools.scenes", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", type=Path, metavar="OUT", help="the data set's folder")
    parser.add_argument(
        "--split", nargs="+", choices=LENGTHS, default=["train", "val"],
        help="train_seen shows the unseen names as rarely as any others",
    )  # fmt: skip
    parser.add_argument("--length", type=int, help=f"scenes of each split (default: {LENGTHS})")
    parser.add_argument("--size", type=int, default=128, help="side in pixels")
    parser.add_argument("--seed", type=int, default=0, help="other scenes of the same kind")
    parser.add_argument("--zoom", type=int, default=1, help="1, or how much larger all is drawn")
    args = parser.parse_args(arguments)
    options = {key: getattr(args, key) for key in ("size", "seed", "zoom")}
    try:
        write_folder(args.out, dict.fromkeys(args.split, args.length), **options)
    except (ZssegError, OSError) as error:
        print(f"tools.scenes: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: open it as --dataset folder --root {args.out} --split {args.split[-1]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
