"""Sleep and wake as reported by macOS: IOKit through ctypes, on a thread with its own run loop.

The system waits up to 30 s for the answer to "will sleep". So that thread has the event loop pause the guest, waits
for it, and then allows the sleep. Its wait has a deadline, because the loop may be busy or closed.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import ctypes
import enum
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from ctypes import POINTER, byref, c_int32, c_ssize_t, c_uint32, c_void_p
from dataclasses import dataclass
from typing import Any

from ovm.power.filter import Edges

log = logging.getLogger(__name__)

SLEEP_LIMIT_S = 10.0
"""Longest delay of a sleep."""
LOOP_S = 1.0
"""Extra delay for an event loop that does not answer."""
JOIN_S = 3.0


class Message(enum.IntEnum):
    """Messages of the power domain, from IOMessage.h."""

    CAN_SLEEP = 0xE0000270
    """The idle system requests to sleep. Requires an answer."""
    WILL_SLEEP = 0xE0000280
    """The system sleeps after the answer. Requires an answer."""
    WILL_NOT_SLEEP = 0xE0000290
    HAS_POWERED_ON = 0xE0000300
    WILL_POWER_ON = 0xE0000320
    """Sent before disk and network work."""


_Heard = ctypes.CFUNCTYPE(None, c_void_p, c_uint32, c_uint32, c_ssize_t)
"""IOServiceInterestCallback. Its last argument, declared as a pointer, is a number here: the notification's id."""


class _SourceContext(ctypes.Structure):
    """CFRunLoopSourceContext, version 0."""

    _fields_ = [
        ("version", c_ssize_t),
        ("info", c_void_p),
        ("retain", c_void_p),
        ("release", c_void_p),
        ("copy_description", c_void_p),
        ("equal", c_void_p),
        ("hash", c_void_p),
        ("schedule", c_void_p),
        ("cancel", c_void_p),
        ("perform", c_void_p),
    ]


_Signatures = Mapping[str, tuple[Any, Sequence[Any]]]
"""Result and argument types by function name; without them ctypes would cut values to 32 bits."""

_IOKIT: _Signatures = {
    "IORegisterForSystemPower": (c_uint32, [c_void_p, POINTER(c_void_p), _Heard, POINTER(c_uint32)]),
    "IOAllowPowerChange": (c_int32, [c_uint32, c_ssize_t]),
    "IONotificationPortGetRunLoopSource": (c_void_p, [c_void_p]),
    "IODeregisterForSystemPower": (c_int32, [POINTER(c_uint32)]),
    "IOServiceClose": (c_int32, [c_uint32]),
    "IONotificationPortDestroy": (None, [c_void_p]),
}
_COREFOUNDATION: _Signatures = {
    "CFRunLoopGetCurrent": (c_void_p, []),
    "CFRunLoopRun": (None, []),
    "CFRunLoopStop": (None, [c_void_p]),
    "CFRunLoopWakeUp": (None, [c_void_p]),
    "CFRunLoopAddSource": (None, [c_void_p, c_void_p, c_void_p]),
    "CFRunLoopRemoveSource": (None, [c_void_p, c_void_p, c_void_p]),
    "CFRunLoopSourceCreate": (c_void_p, [c_void_p, c_ssize_t, POINTER(_SourceContext)]),
    "CFRunLoopSourceSignal": (None, [c_void_p]),
    "CFRunLoopSourceInvalidate": (None, [c_void_p]),
    "CFRelease": (None, [c_void_p]),
}


@dataclass(frozen=True, slots=True)
class Libraries:
    """Paths of the two frameworks."""

    iokit: str = "/System/Library/Frameworks/IOKit.framework/IOKit"
    corefoundation: str = "/System/Library/Frameworks/CoreFoundation.framework/CoreFoundation"


async def watch(edges: Edges, *, libraries: Libraries | None = None) -> None:
    """Report the system's sleeps and wakes until cancelled; then end the thread.

    Args:
        edges: Gets every sleep and wake.
        libraries: Default: the system's own.
    """
    listener = _Listener(edges, libraries or Libraries())
    # a daemon thread, so that the process can end even if the event loop ends without cancelling this task
    thread = threading.Thread(target=listener.run, name="ovm: sleep and wake", daemon=True)
    thread.start()
    try:
        await asyncio.Event().wait()
    finally:
        listener.stop()
        await asyncio.to_thread(thread.join, JOIN_S)
        if thread.is_alive():
            log.warning("the thread for sleep and wake has not ended within %g s", JOIN_S)


class _Listener:
    def __init__(self, edges: Edges, libraries: Libraries) -> None:
        self._edges, self._libraries = edges, libraries
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._ended = False
        self._asking: concurrent.futures.Future[None] | None = None
        self._halt: Callable[[], None] | None = None
        """Stops the run loop; ``None`` while there is none."""

    def run(self) -> None:
        """Listen until stopped. Runs in the thread."""
        try:
            self._iokit = _load(self._libraries.iokit, _IOKIT)
            self._cf = _load(self._libraries.corefoundation, _COREFOUNDATION)
            mode = c_void_p.in_dll(self._cf, "kCFRunLoopDefaultMode")
        except (OSError, AttributeError, ValueError) as error:
            log.info("no IOKit; the host's sleep is detected only by its clock: %s", error)
            return
        try:
            with contextlib.ExitStack() as stack:
                if self._stoppable(stack, mode) and self._register(stack, mode):
                    self._cf.CFRunLoopRun()
        except Exception:
            log.exception("the listener for the host's sleep and wake failed")

    def stop(self) -> None:
        """End :meth:`run` at any point. Call it from another thread."""
        with self._lock:
            self._ended = True
            if self._asking is not None:
                self._asking.cancel()
            if self._halt is not None:
                self._halt()

    def _stoppable(self, stack: contextlib.ExitStack, mode: c_void_p) -> bool:
        """Add a source that stops the run loop; return whether no stop was requested yet.

        CFRunLoopStop has no effect on a loop that does not run yet; a signalled source waits until the loop runs.
        """
        cf, run_loop = self._cf, self._cf.CFRunLoopGetCurrent()
        stop = ctypes.cast(cf.CFRunLoopStop, c_void_p)
        source = cf.CFRunLoopSourceCreate(None, 0, byref(_SourceContext(info=run_loop, perform=stop)))
        stack.callback(cf.CFRelease, source)
        stack.callback(cf.CFRunLoopSourceInvalidate, source)
        cf.CFRunLoopAddSource(run_loop, source, mode)

        def halt() -> None:
            cf.CFRunLoopSourceSignal(source)
            cf.CFRunLoopWakeUp(run_loop)

        with self._lock:
            self._halt = halt
            stack.callback(self._no_halt)  # before the source is released and the thread ends, with its run loop
            return not self._ended

    def _no_halt(self) -> None:
        with self._lock:
            self._halt = None

    def _register(self, stack: contextlib.ExitStack, mode: c_void_p) -> bool:
        cf, iokit = self._cf, self._iokit
        port, notifier = c_void_p(), c_uint32()
        self._callback = _Heard(self._heard)  # keep a reference for as long as IOKit may call it
        self._root = iokit.IORegisterForSystemPower(None, byref(port), self._callback, byref(notifier))
        if not self._root:
            log.info("IOKit does not report sleep; it is detected only by the host's clock")
            return False
        stack.callback(iokit.IONotificationPortDestroy, port)
        stack.callback(iokit.IOServiceClose, self._root)
        stack.callback(iokit.IODeregisterForSystemPower, byref(notifier))
        source, run_loop = iokit.IONotificationPortGetRunLoopSource(port), cf.CFRunLoopGetCurrent()
        cf.CFRunLoopAddSource(run_loop, source, mode)
        stack.callback(cf.CFRunLoopRemoveSource, run_loop, source, mode)
        return True

    def _heard(self, _refcon: int | None, _service: int, message: int, notification: int) -> None:
        """Handle a power message, called by the run loop. Raise nothing, and always answer a sleep."""
        try:
            match message:
                case Message.CAN_SLEEP:
                    self._allow(notification)
                case Message.WILL_SLEEP:
                    try:
                        self._sleep()
                    finally:
                        self._allow(notification)
                case Message.WILL_NOT_SLEEP:
                    self._tell(self._edges.stayed_awake)
                case Message.HAS_POWERED_ON:
                    self._tell(self._edges.wake)
        except Exception:
            log.exception("could not handle the power message %#x", message)

    def _allow(self, notification: int) -> None:
        if status := self._iokit.IOAllowPowerChange(self._root, notification):
            log.warning("IOAllowPowerChange failed: %#x", status & 0xFFFFFFFF)

    def _sleep(self) -> None:
        too_late = threading.Event()

        async def pause() -> None:
            if not too_late.is_set():  # otherwise the event loop was busy, and the host may have slept already
                await self._edges.sleep(SLEEP_LIMIT_S)

        with self._lock:
            if self._ended:
                return
            work = pause()
            try:
                asking = self._asking = asyncio.run_coroutine_threadsafe(work, self._loop)
            except RuntimeError:  # the event loop is closed
                work.close()
                return
        try:
            asking.result(SLEEP_LIMIT_S + LOOP_S)
        except concurrent.futures.CancelledError:
            log.debug("stopped while the host is about to sleep")
        except TimeoutError:
            too_late.set()
            asking.cancel()
            log.warning("the event loop did not answer before the host's sleep")

    def _tell(self, edge: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self._loop.call_soon_threadsafe(edge)


def _load(path: str, signatures: _Signatures) -> ctypes.CDLL:
    library = ctypes.CDLL(path)
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
