"""A run of its own process, which tests kill, signal and launch twice."""

import argparse
import os
import time
from pathlib import Path

import torch

from support.toy_training import ToyTask, config, toy_batches, toy_schedule
from zsseg_rt.training.loop.loop import run_loop
from zsseg_rt.training.loop.run_state import leave_processes


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bad")
    parser.add_argument("--hang-at", type=int)
    parser.add_argument("--hang-in-save", type=int)
    parser.add_argument("--signal-at", type=int)
    parser.add_argument("--signal", type=int)
    return parser.parse_args()


def hang():
    print("hanging", flush=True)
    time.sleep(600)


def main():
    options = parse()

    def source(**place):
        for index, batch in enumerate(toy_batches(**place), start=1):
            if index == options.hang_at:
                hang()
            if index == options.signal_at:
                os.kill(os.getpid(), options.signal)
            yield batch

    def save(content, stream, *arguments, **more):
        if isinstance(content, dict) and content.get("step") == options.hang_in_save:
            stream.write(b"half a file")
            stream.flush()
            hang()
        write(content, stream, *arguments, **more)

    write, torch.save = torch.save, save
    result = run_loop(
        ToyTask(bad_picture=options.bad),
        source,
        config=config(),
        run_folder=options.folder,
        schedule=toy_schedule,
    )
    print(f"finished={result.finished} step={result.step}")
    leave_processes()


if __name__ == "__main__":
    main()
