"""The server's side of the websocket: which client listens under which id, and the messages that ComfyUI sends."""

import base64
import hashlib
import json
import socket
import struct
import threading
from typing import Any, BinaryIO

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_TEXT, _BINARY, _CLOSE, _PING, _PONG = 1, 2, 8, 9, 10


def accepted_key(key: str) -> str:
    """`Sec-WebSocket-Accept` for a client's key (RFC 6455, 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key.encode() + _GUID).digest()).decode()


class Websocket:
    """One open websocket; `read_until_closed` runs in the thread of its connection."""

    def __init__(self, connection: socket.socket, incoming: BinaryIO):
        self._connection, self._incoming = connection, incoming
        self._lock = threading.Lock()

    def send(self, kind: str, data: dict[str, Any]) -> None:
        self._send(_TEXT, json.dumps({"type": kind, "data": data}).encode())

    def send_raw(self, content: bytes, binary: bool) -> None:
        self._send(_BINARY if binary else _TEXT, content)

    def cut(self) -> None:
        """Close the connection without a closing frame, as a proxy does."""
        self._connection.shutdown(socket.SHUT_RDWR)

    def read_until_closed(self) -> None:
        """Answer pings and the closing frame; everything else from the client is ignored."""
        while (frame := self._frame()) is not None:
            code, content = frame
            if code == _PING:
                self._send(_PONG, content)
            if code == _CLOSE:
                self._send(_CLOSE, content[:2])
                return

    def _frame(self) -> tuple[int, bytes] | None:
        head = self._incoming.read(2)
        if len(head) < 2:
            return None
        length = head[1] & 127
        if length > 125:
            size = 2 if length == 126 else 8
            length = int.from_bytes(self._incoming.read(size))
        mask = self._incoming.read(4)
        content = self._incoming.read(length)
        return head[0] & 15, bytes(byte ^ mask[position % 4] for position, byte in enumerate(content))

    def _send(self, code: int, content: bytes) -> None:
        length = len(content)
        size = bytes([length]) if length < 126 else b"\x7e" + struct.pack(">H", length)
        if length >= 2**16:
            size = b"\x7f" + struct.pack(">Q", length)
        with self._lock:
            self._connection.sendall(bytes([0x80 | code]) + size + content)


class WebsocketClients:
    """The open websockets by client id.

    As in ComfyUI, a second one with the same id replaces the first, and when the first is closed the id is forgotten: the
    second then receives nothing more.
    """

    def __init__(self) -> None:
        self._sockets: dict[str, Websocket] = {}

    def add(self, client_id: str, opened: Websocket, queue_remaining: int, node: str | None) -> None:
        self._sockets[client_id] = opened
        opened.send("status", {"status": {"exec_info": {"queue_remaining": queue_remaining}}, "sid": client_id})
        if node is not None:
            opened.send("executing", {"node": node})

    def remove(self, client_id: str) -> None:
        self._sockets.pop(client_id, None)

    def all(self) -> list[Websocket]:
        return list(self._sockets.values())

    def notify(self, client_id: str | None, kind: str, data: dict[str, Any]) -> None:
        """Send a message to the client of a prompt, a status to all. A closed websocket is removed."""
        for each, opened in list(self._sockets.items()):
            if kind == "status" or each == client_id:
                try:
                    opened.send(kind, data)
                except OSError:
                    self.remove(each)
