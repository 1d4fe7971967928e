"""What Triton Inference Server adds to the engine's time for a frame.

    zsseg-rt export demo-scenes --triton models --name demo --threads 1 --classes "red ball"
    tritonserver --model-repository=models           # in another terminal
    python triton_latency.py [ROUNDS]

Needs ``pip install tritonclient[grpc,http]``. The engine here, the server over HTTP and over gRPC
label one frame in turns; what Triton adds is the median of the differences within the rounds.
"""

import argparse
import time
from collections.abc import Callable

import cv2
import numpy as np

from zsseg_rt import Bundle, Engine, EngineConfig, read_photo
from zsseg_rt.demo import demo_photos

WARM_UP = 20


def server(client: object, address: str, frame: np.ndarray) -> Callable[[], np.ndarray]:
    """A call that labels the frame over the network."""
    connection = client.InferenceServerClient(address)

    def call() -> np.ndarray:
        tensor = client.InferInput("frame", frame.shape, "UINT8")
        tensor.set_data_from_numpy(frame)
        wanted = [client.InferRequestedOutput("labels")]
        return connection.infer("demo", [tensor], outputs=wanted).as_numpy("labels")

    return call


def main(rounds: int) -> None:
    """Take turns, and print medians in milliseconds."""
    import tritonclient.grpc
    import tritonclient.http

    frame = cv2.resize(read_photo(demo_photos("scenes")[0]), (640, 480))
    with Engine(Bundle.demo("scenes"), EngineConfig(device="cpu", num_threads=1)) as engine:
        engine.set_classes(["red ball"])
        calls = {
            "engine": lambda: engine.segment(frame).labels,
            "HTTP": server(tritonclient.http, "localhost:8000", frame),
            "gRPC": server(tritonclient.grpc, "localhost:8001", frame),
        }
        times = {name: [] for name in calls}
        for round_ in range(WARM_UP + rounds):
            for name, call in calls.items():
                begin = time.perf_counter()
                call()
                if round_ >= WARM_UP:
                    times[name].append(1e3 * (time.perf_counter() - begin))
    for name, values in times.items():
        added = np.median(np.subtract(values, times["engine"]))
        print(f"{name}: {np.median(values):.2f} ms, {added:+.2f} ms to the engine")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rounds", type=int, nargs="?", default=200)
    main(parser.parse_args().rounds)
