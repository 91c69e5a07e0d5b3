"""A trainer that learns nothing and answers at once: what it returns follows from the request.

Speaks the trainer's socket like the real one, without torch, so that a drill's devices are cheap
and everybody can work out what a round must come to.
"""

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from fedia3.adapters.manifest import read_manifest, schema
from fedia3.client.trainer_settings import TrainerSettings
from fedia3.client.trainer_socket import Frame, FrameServer

SLEEP = "DRILL_TRAINING_S"  # how long a training takes, s


def contribution(seed: int, n_params: int) -> tuple[np.ndarray, int]:
    """The delta and the example count of the client that was given ``seed`` in a round."""
    lot = hashlib.sha256(str(seed).encode()).digest()
    size = (int.from_bytes(lot[:4]) % 1000 - 500) * 1e-5
    return np.full(n_params, size, dtype=np.float32), 1 + lot[4] % 7


def main() -> None:
    """The process."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    settings = TrainerSettings.read(Path(sys.argv[1]))
    shape = schema(read_manifest(settings.base))
    status = {"base_digest": shape.base_digest, "schema_digest": shape.digest, "texts": 100}

    def answer(frame: Frame) -> Frame:
        match frame.header["do"]:
            case "train":
                time.sleep(float(os.environ.get(SLEEP, "0")))
                delta, examples = contribution(frame.header["seed"], shape.n_params)
                metrics = {"loss_first": 2.0, "loss_mean": 1.5, "grad_norm": 0.01}
                return Frame.with_vector({"num_examples": examples, "metrics": metrics}, delta)
            case "personalize":
                facts = {"choice": "personal", "global_loss": 2.0, "personal_loss": 1.0}
                facts |= {"num_examples": 70, "data_digest": "", "test": {}}
                return Frame.with_vector(facts, np.full(shape.n_params, 1e-3, dtype=np.float32))
            case _:
                return Frame(status)

    with FrameServer(settings.socket, answer) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
