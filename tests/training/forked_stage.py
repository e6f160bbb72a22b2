"""Runs the train stage in forked processes, so that torch is imported only once.

Reads one JSON object per line, {"variables": ..., "log": ...}. Prints the process id of the run, and its wait status when it has
ended.
"""

import json
import os
import sys

import torch

import train_lora
from common.errors import run_main
from training import trainer  # noqa: F401 - what main would import

torch.set_num_threads(1)


def run(variables: dict[str, str], log: str) -> int:
    """Run the stage in this process and return its exit code."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.update(variables)
    return run_main(train_lora.STAGE, lambda: train_lora.main([]))


for line in sys.stdin:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = run(**json.loads(line))
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
