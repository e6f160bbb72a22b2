"""All ComfyUI servers of one run: which of them can be used, the threads that work with them, and a clean stop."""

import contextlib
import functools
import queue
import threading
from collections.abc import Callable, Iterator

from collecting.client import ComfyUI
from collecting.harvest import JobResult
from collecting.http import Address
from collecting.image_store import ImageStore
from collecting.jobs import Job, JobQueue, Plan
from collecting.journal import Journal
from collecting.preflight import check_refusal
from collecting.worker import ServerWorker, unknown_prompt_message
from common.errors import ComfyUIError, bullet_list

STOP_TIMEOUT_S = 3.0
"""How long a stop waits for requests that are under way."""


class ServerPool(contextlib.AbstractContextManager):
    """Use as a context manager: however the block ends, prompts of this run that still wait on a server are dequeued."""

    def __init__(
        self,
        addresses: list[Address],
        plan: Plan,
        journal: Journal,
        store: ImageStore,
        log: Callable[[str], None],
        *,
        delay_s: float,
        stall_timeout_s: float,
        api_key: str = "",
    ):
        self.workers: list[ServerWorker] = []
        self._addresses, self._plan, self._journal, self._store, self._log = addresses, plan, journal, store, log
        self._delay_s, self._stall_timeout_s, self._api_key = delay_s, stall_timeout_s, api_key
        self._threads: list[threading.Thread] = []
        self._events: queue.SimpleQueue[str | JobResult | BaseException] = queue.SimpleQueue()
        """From the threads: log lines, results, and the exceptions that ended a thread."""
        self._stopping = threading.Event()
        self._client = functools.partial(ComfyUI, client_id=journal.client_id(), sleep=self._stopping.wait)

    def __exit__(self, *_exception: object) -> None:
        self._stopping.set()
        for worker in self.workers:
            worker.stop_download()
        for thread in self._threads:
            thread.join(STOP_TIMEOUT_S)
        with contextlib.ExitStack() as every:  # also when the log can no longer be written
            for worker in self.workers:
                if not worker.is_unavailable and (prompt_ids := worker.unfinished_prompts()):
                    every.callback(self._dequeue, worker.address, prompt_ids)

    def start(self, jobs: list[Job]) -> None:
        """Connect to the servers, reattach to the prompts of earlier runs, and start the threads.

        Raises ComfyUIError when no server can be used.
        """
        job_queue = JobQueue()
        self.workers = [
            ServerWorker(
                address,
                self._plan,
                self._journal,
                self._store,
                job_queue,
                self._events.put,
                self._stopping,
                delay_s=self._delay_s,
                stall_timeout_s=self._stall_timeout_s,
                api_key=self._api_key,
            )
            for address in self._usable_addresses()
        ]
        job_queue.requeue([job for job in jobs if not self._reattach(job)])
        for worker in self.workers:
            # A stop does not wait for `listen`: it may be blocked on a silent socket.
            self._start_thread(functools.partial(self._listen, worker))
            self._threads += [self._start_thread(worker.run), self._start_thread(worker.download)]

    def results(self, number: int, timeout_s: float) -> Iterator[JobResult | None]:
        """`number` results as the jobs end, and None whenever `timeout_s` passes without one.

        Raises ComfyUIError when no server is left, and any other exception that ended a thread.
        """
        failed: list[ComfyUIError] = []
        while number:
            try:
                event = self._events.get(timeout=timeout_s)
            except queue.Empty:
                yield None
                continue
            match event:
                case JobResult():
                    number -= 1
                    yield event
                case str():
                    self._log(event)
                case ComfyUIError():
                    failed.append(event)
                    if len(failed) == len(self.workers):
                        raise _combined("no ComfyUI server is left:", failed)
                    self._log(f"{event}. Continuing with the other servers.")
                case BaseException():
                    raise event

    def free_memory(self) -> None:
        """Ask every server to unload its models, unless prompts of other clients are in its queue."""
        for worker in self.workers:
            if worker.is_unavailable or worker.has_failed:
                continue
            with self._client(worker.address, retry_delays_s=()) as server:
                try:
                    queued = server.queue()
                    if queued.running | queued.waiting:
                        self._log(f"ComfyUI at {server.url}: models stay loaded (prompts of other clients are in its queue)")
                        continue
                    server.free_memory()
                    self._log(f"ComfyUI at {server.url}: requested to unload its models (COMFYUI_FREE=0 keeps them loaded)")
                except ComfyUIError as error:
                    self._log(f"Could not free ComfyUI's memory: {error}")

    def _usable_addresses(self) -> list[Address]:
        usable, errors = [], []
        for address in self._addresses:
            try:
                with self._client(address) as server:
                    version = server.version()
                with self._client(address, retry_delays_s=()) as server:
                    check_refusal(server, self._plan)
                self._log(f"Connected to ComfyUI {version} at {server.url}")
                usable.append(address)
            except ComfyUIError as error:
                errors.append(error)
        if not usable:
            raise _combined("no ComfyUI server can be used:", errors)
        for error in errors:
            self._log(f"{error}. Continuing with the other servers.")
        self._log("Ctrl-C stops safely; run the same command again to continue.")
        return usable

    def _reattach(self, job: Job) -> bool:
        """Whether a server still has the job from an earlier run; every server is asked before it is submitted again."""
        submission = self._journal.in_flight.get(job.key)
        if submission is None:
            return False
        if any(worker.reattach(job, submission) for worker in self.workers):
            return True
        urls = ", ".join(worker.address.url for worker in self.workers)
        self._log(f"{job.label}: {unknown_prompt_message(urls, submission)}")
        return False

    def _listen(self, worker: ServerWorker) -> None:
        """Follow the websocket. Only the display depends on it, so not even a bug in it ends the run."""
        try:
            worker.monitor.listen()
        except Exception as error:
            worker.monitor.status = None
            self._events.put(f"The progress of {worker.address.url} is not shown any more, because of a bug in LoRACat ({error!r})")

    def _start_thread(self, target: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                target()
            except BaseException as error:  # raised again where the events are read
                self._events.put(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def _dequeue(self, address: Address, prompt_ids: list[str]) -> None:
        """Remove this run's waiting prompts from the queue, and record which of them are gone by that."""
        with self._client(address, retry_delays_s=()) as server:
            try:
                server.dequeue(prompt_ids)
                queued = server.queue()
                left = [each for each in prompt_ids if each in queued.running | queued.waiting or server.history(each) is not None]
                if removed := [each for each in prompt_ids if each not in left]:
                    self._journal.record("dequeued", prompt_ids=removed)
                    self._log(f"Removed this run's waiting prompts from the queue of {server.url} ({len(removed)})")
                if queued.running.intersection(prompt_ids):
                    self._log(f"A prompt of this run is still running on {server.url}: the next run collects its images")
            except ComfyUIError as error:
                self._log(f"Could not remove this run's prompts from the queue: {error}")


def _combined(title: str, errors: list[ComfyUIError]) -> ComfyUIError:
    return errors[0] if len(errors) == 1 else ComfyUIError(bullet_list(title, [str(error) for error in errors]))
