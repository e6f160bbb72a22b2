"""All the servers of one run: who is there, what they already have of ours, and an orderly end."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from collecting.client import ComfyUI
from collecting.harvest import Fetcher
from collecting.http import Address
from collecting.image_store import ImageStore
from collecting.jobs import Job, Plan
from collecting.journal import Progress
from collecting.monitor import Live
from collecting.worker import Board, Finished, GaveUp, Said, Station, forgotten
from common.errors import ComfyUIError, bullet_list

LEAVING_S = 3.0
"""How long a stop waits for a request that is under way."""


@dataclass
class Fleet:
    """Use as a context manager: whatever ends the block, entries of ours that still wait on a server are withdrawn."""

    addresses: list[Address]
    plan: Plan
    progress: Progress
    store: ImageStore
    say: Callable[[str], None]
    delay_s: float
    stall_timeout_s: float
    lives: list[Live] = field(default_factory=list)
    """What each server says of itself while it works."""
    _stations: list[Station] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)
    _events: "queue.SimpleQueue[Any]" = field(default_factory=queue.SimpleQueue)
    _stopping: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stopping.set()
        for station in self._stations:
            station.wake()
        for thread in self._threads:
            thread.join(LEAVING_S)
        for live, station in self._pairs():
            self._withdraw(live.address, station)

    def start(self, jobs: list[Job]) -> None:
        """See who is there, take over what earlier runs sent, and set to work.

        Raises ComfyUIError when no server can be used.
        """
        here = self._reachable()
        fetcher = Fetcher(self.plan, self.progress, self.store, self._stopping.wait)
        board = Board([])
        self.lives = [Live(address, self.progress.client_id(), self._stopping) for address in here]
        self._stations = [self._station(live, board, fetcher) for live in self.lives]
        board.give_back([job for job in jobs if not self._adopted(job)])
        for live in self.lives:
            self._start(live.listen)
        self._threads = [self._start(work) for station in self._stations for work in (station.work, station.fetch)]

    def finished(self, number: int, patience_s: float) -> Iterator[Finished | None]:
        """`number` pieces of work as they end; None whenever `patience_s` passed without one.

        Raises ComfyUIError when no server is left, and whatever a thread failed with.
        """
        left, reasons = len(self._stations), []
        while number:
            try:
                event = self._events.get(timeout=patience_s)
            except queue.Empty:
                yield None
                continue
            match event:
                case Finished():
                    number -= 1
                    yield event
                case Said():
                    self.say(event.line)
                case GaveUp():
                    left -= 1
                    reasons.append(str(event.error))
                    if not left:
                        raise event.error if len(reasons) == 1 else ComfyUIError(bullet_list("no ComfyUI is left:", reasons))
                    self.say(f"{event.error}. The other servers go on.")
                case BaseException():
                    raise event

    def free(self) -> None:
        """Let every server give its memory back, unless somebody else's prompts are in its queue."""
        for live, station in self._pairs():
            if station.is_away or station.is_over:
                continue
            with self._client(live.address, ()) as server:
                try:
                    queued = server.queue()
                    if queued.running | queued.waiting:
                        self.say(f"ComfyUI at {server.url} keeps its models: prompts of somebody else are in its queue.")
                        continue
                    server.free()
                    self.say(f"ComfyUI at {server.url} was told to free its memory.")
                except ComfyUIError as error:
                    self.say(f"Its memory could not be freed: {error}")

    def _reachable(self) -> list[Address]:
        here, reasons = [], []
        for address in self.addresses:
            try:
                with self._client(address) as server:
                    self.say(f"ComfyUI {server.version()} at {server.url}. Ctrl-C loses nothing: the same command goes on.")
                here.append(address)
            except ComfyUIError as error:
                reasons.append(error)
        if not here:
            raise reasons[0] if len(reasons) == 1 else ComfyUIError(bullet_list("no ComfyUI can be used:", list(map(str, reasons))))
        for error in reasons:
            self.say(f"{error}. The other servers go on without it.")
        return here

    def _station(self, live: Live, board: Board, fetcher: Fetcher) -> Station:
        servers = (self._client(live.address), self._client(live.address))
        return Station(
            servers,
            board,
            self.plan,
            self.progress,
            fetcher,
            self._events.put,
            self._stopping,
            delay_s=self.delay_s,
            stall_timeout_s=self.stall_timeout_s,
            life_sign_s=lambda: live.last_sign_s,
        )

    def _client(self, address: Address, patience_s: tuple[float, ...] | None = None) -> ComfyUI:
        return ComfyUI(address, self.progress.client_id(), patience_s, self._stopping.wait)

    def _adopted(self, job: Job) -> bool:
        """What an earlier run sent is looked up on every server before it is sent again."""
        submission = self.progress.in_flight(job.key)
        if submission is None or any(station.adopt(job, submission) for station in self._stations):
            return submission is not None
        self.say(f"{job.label}: {forgotten(', '.join(station.url for station in self._stations), submission)}")
        return False

    def _start(self, work: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        thread.start()
        return thread

    def _run(self, work: Callable[[], None]) -> None:
        """A thread: what it fails with is raised where the events are read."""
        try:
            work()
        except BaseException as error:
            self._events.put(error)

    def _withdraw(self, address: Address, station: Station) -> None:
        waiting = station.unfinished()
        if not waiting or station.is_away:
            return
        with self._client(address, ()) as server:
            try:
                server.withdraw(waiting)
                self.say(f"What waits of ours at {server.url} was taken out of its queue; what runs there goes on.")
            except ComfyUIError as error:
                self.say(f"What waits of ours stays in the queue: {error}")

    def _pairs(self) -> Iterator[tuple[Live, Station]]:
        return zip(self.lives, self._stations, strict=True)
