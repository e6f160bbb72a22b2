"""`python -m demo.standin_comfyui --folder DIR`: serve until Ctrl-C; the first line printed is the URL."""

import argparse
import contextlib
import signal
from pathlib import Path

from demo.standin_comfyui.catalogue import VERSIONS
from demo.standin_comfyui.faults import KINDS
from demo.standin_comfyui.server import StandIn


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.standin_comfyui", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where input/, output/ and temp/ are")
    parser.add_argument("--port", type=int, default=0, help="0: a free port")
    parser.add_argument("--version", default=VERSIONS[0], choices=VERSIONS, help="the version of ComfyUI whose answers are given")
    parser.add_argument("--seconds-per-job", type=float, default=0.0, help="how long a prompt takes")
    parser.add_argument("--fault", action="append", default=[], choices=sorted(KINDS), help="a fault to simulate; may be repeated")
    flags = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with StandIn(flags.folder, seconds_per_job=flags.seconds_per_job, port=flags.port, version=flags.version) as standin:
        for name in flags.fault:
            standin.fault(name)
        print(standin.url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
