"""Imports everything once, and forks the processes that forked_python.py requests.

It imports at the first request, so a run of tests that starts no such process does not pay for it. It ends when its standard
input is closed, together with everything that it forked.
"""

import gc
import io
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path


def serve(listener: socket.socket) -> dict:
    """Fork on request until standard input ends. Returns in the forked processes only, with their request."""
    running: dict[int, tuple[int, socket.socket]] = {}  # process id: its pidfd and connection
    has_imported = False
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj == 0:
                    for process in running:
                        os.kill(process, signal.SIGKILL)
                    os._exit(0)
                if key.fileobj is listener:
                    if not has_imported:
                        import_everything()
                        has_imported = True
                    connection, streams, request = receive(listener)
                    process = os.fork()
                    if process == 0:
                        for number, stream in enumerate(streams):
                            os.dup2(stream, number)
                        for file in (listener, connection, *(connection for _, connection in running.values())):
                            file.close()
                        for descriptor in (*streams, *(pidfd for pidfd, _ in running.values())):
                            os.close(descriptor)
                        return request
                    for stream in streams:
                        os.close(stream)
                    connection.sendall(process.to_bytes(8, "little"))
                    running[process] = os.pidfd_open(process), connection
                    for file in running[process]:
                        selector.register(file, selectors.EVENT_READ, process)
                elif key.data in running:  # the process has ended, or the other side has closed the connection
                    pidfd, connection = running.pop(key.data)
                    if key.fileobj is connection:
                        os.kill(key.data, signal.SIGKILL)
                    status = os.waitpid(key.data, 0)[1]
                    for file in (pidfd, connection):
                        selector.unregister(file)
                    os.close(pidfd)
                    with suppress(BrokenPipeError), connection:
                        connection.sendall(status.to_bytes(8, "little"))


def import_everything() -> None:
    import torch

    import train_lora  # noqa: F401
    import training.job
    import training.preflight
    import training.trainer  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page
    assert len(os.listdir("/proc/self/task")) == 1, "a lock that another thread holds would stay locked in a fork"


def receive(listener: socket.socket) -> tuple[socket.socket, list[int], dict]:
    connection = listener.accept()[0]
    length, streams, _, _ = socket.recv_fds(connection, 8, 3)
    return connection, streams, json.loads(connection.recv(int.from_bytes(length, "little"), socket.MSG_WAITALL))


def become(executable: str, arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """Run the script `arguments[0]` as the interpreter would have done with this environment."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    os.environ.pop("LORACAT_LAUNCHER_PID", None)  # a process that the launcher did not start itself would end
    sys.executable, sys.argv = executable, arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    # Objects for the streams that the process has now: the old ones remember whether the server's could seek.
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(
            open(number, "wb", closefd=False),  # noqa: SIM115 - as long as the process
            encoding="utf-8",
            errors=old.errors,
            line_buffering=number == 2 or os.isatty(number),
            write_through="PYTHONUNBUFFERED" in environment,
        )
        for number, old in ((1, sys.stdout), (2, sys.stderr))
    )
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as ending:
        code = ending.code or 0
    else:
        code = 0
    sys.stdout.flush()
    os._exit(code)  # the destructors of libraries would wait for threads that a fork does not have


if __name__ == "__main__":
    with socket.socket(socket.AF_UNIX) as own:
        own.bind(sys.argv[1])
        own.listen(64)
        request = serve(own)
    become(**request)
