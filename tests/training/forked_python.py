"""A stand-in for the Python interpreter: runs a script as a fork of the fork server, which has imported everything.

Importing torch, diffusers and PEFT takes about ten seconds of a core; a fork takes milliseconds. The command `python`, which
tests/conftest.py writes and which runs this file, can be given wherever a program takes an interpreter: as PYTHON of run.sh, or
as the first word of a command. The script gets the arguments, environment, working directory and standard streams of the
command. The command forwards signals to the script, ends as it ends, and takes it along when it is killed. Anything but a script
that trains is run by the real interpreter.

Differences from a real start: the script's parent process is the server, the libraries have read their environment variables
already, and SIGSTOP stops only the command. Tests of imports and of a stage's relation to its parent process use the real
interpreter. Standard library only, because this file is run for every command.
"""

import array
import json
import os
import signal
import socket
import sys
from pathlib import Path

NOT_FORKED = ("collect_images.py", "caption_images.py")
"""They import little; onnxruntime starts a thread when it is imported, and a process with threads cannot be forked safely."""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def fork(command: Path, arguments: list[str], environment: dict[str, str], streams=(0, 1, 2)) -> tuple[int, socket.socket]:
    """Have the server beside `command` run the script `arguments[0]`.

    Returns the script's process id, and the connection over which `read_number` gets its wait status; closing it kills the script.
    """
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(command.with_name("socket")))
    request = {"executable": str(command), "arguments": arguments, "environment": environment, "folder": os.getcwd()}
    encoded = json.dumps(request).encode()
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", streams))
    connection.sendmsg([len(encoded).to_bytes(8, "little")], [rights])
    connection.sendall(encoded)
    return read_number(connection), connection


def read_number(connection: socket.socket) -> int:
    """The next number that the server sends."""
    received = connection.recv(8, socket.MSG_WAITALL)
    if len(received) < 8:
        raise ConnectionError("the fork server has ended")
    return int.from_bytes(received, "little")


def main(command: Path, *arguments: str) -> None:
    if not (arguments and arguments[0].endswith(".py")) or Path(arguments[0]).name in NOT_FORKED:
        os.execv(sys.executable, [sys.executable, *arguments])
    script, early = 0, []

    def forward(signum: int, _frame: object) -> None:
        if script:
            os.kill(script, signum)
        else:
            early.append(signum)

    for signum in FORWARDED:
        signal.signal(signum, forward)
    script, connection = fork(command, list(arguments), dict(os.environ))
    for signum in early:
        os.kill(script, signum)
    code = os.waitstatus_to_exitcode(read_number(connection))
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
