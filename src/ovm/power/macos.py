"""Sleep and wake as macOS tells them: IOKit through ctypes, on a thread with a run loop of its own.

The system waits up to 30 s for the answer to "will sleep". So the guest is paused first and the sleep allowed after,
in that thread, which meanwhile waits for the event loop: with a deadline of its own, for the loop may be busy or gone.
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
"""How long a sleep waits for us at most."""
LOOP_S = 1.0
"""How much longer it waits for an event loop that does not answer."""
JOIN_S = 3.0


class Message(enum.IntEnum):
    """What the power domain says, from IOMessage.h."""

    CAN_SLEEP = 0xE0000270
    """May the idle system sleep? To be answered."""
    WILL_SLEEP = 0xE0000280
    """To be answered; then it sleeps."""
    WILL_NOT_SLEEP = 0xE0000290
    HAS_POWERED_ON = 0xE0000300
    WILL_POWER_ON = 0xE0000320
    """Too early for disk and network."""


_Heard = ctypes.CFUNCTYPE(None, c_void_p, c_uint32, c_uint32, c_ssize_t)
"""IOServiceInterestCallback. Its last argument is declared a pointer, but is a number here: the notification's id."""


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
"""Name to what is returned, and the arguments: what is not declared would be cut to 32 bits."""

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
    """Where the two frameworks are."""

    iokit: str = "/System/Library/Frameworks/IOKit.framework/IOKit"
    corefoundation: str = "/System/Library/Frameworks/CoreFoundation.framework/CoreFoundation"


async def watch(edges: Edges, *, libraries: Libraries | None = None) -> None:
    """Pass on what the system tells, for ever; the thread has ended when it returns.

    Args:
        edges: Hears of every sleep and wake.
        libraries: By default the system's own.
    """
    listener = _Listener(edges, libraries or Libraries())
    # a daemon: should the event loop vanish without ending us, the process can end all the same
    thread = threading.Thread(target=listener.run, name="ovm: sleep and wake", daemon=True)
    thread.start()
    try:
        await asyncio.Event().wait()
    finally:
        listener.stop()
        await asyncio.to_thread(thread.join, JOIN_S)
        if thread.is_alive():
            log.warning("the thread that listens for sleep and wake has not ended within %g s", JOIN_S)


class _Listener:
    def __init__(self, edges: Edges, libraries: Libraries) -> None:
        self._edges, self._libraries = edges, libraries
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._ended = False
        self._asking: concurrent.futures.Future[None] | None = None
        self._halt: Callable[[], None] | None = None
        """Ends the run loop, while there is one."""

    def run(self) -> None:
        """Listen until stopped. The thread's own."""
        try:
            self._iokit = _load(self._libraries.iokit, _IOKIT)
            self._cf = _load(self._libraries.corefoundation, _COREFOUNDATION)
            mode = c_void_p.in_dll(self._cf, "kCFRunLoopDefaultMode")
        except (OSError, AttributeError, ValueError) as error:
            log.info("no IOKit here, the host's sleep is seen only by its clock: %s", error)
            return
        try:
            with contextlib.ExitStack() as stack:
                if self._stoppable(stack, mode) and self._register(stack, mode):
                    self._cf.CFRunLoopRun()
        except Exception:
            log.exception("the host's sleep and wake are not heard of any more")

    def stop(self) -> None:
        """Have :meth:`run` end, wherever it is. To be called from any other thread."""
        with self._lock:
            self._ended = True
            if self._asking is not None:
                self._asking.cancel()
            if self._halt is not None:
                self._halt()

    def _stoppable(self, stack: contextlib.ExitStack, mode: c_void_p) -> bool:
        """CFRunLoopStop is lost on a loop that does not run yet. A source that was signalled waits until it does."""
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
            stack.callback(self._no_halt)  # before its source is released, and the run loop ends with its thread
            return not self._ended

    def _no_halt(self) -> None:
        with self._lock:
            self._halt = None

    def _register(self, stack: contextlib.ExitStack, mode: c_void_p) -> bool:
        cf, iokit = self._cf, self._iokit
        port, notifier = c_void_p(), c_uint32()
        self._callback = _Heard(self._heard)  # kept for as long as it may be called
        self._root = iokit.IORegisterForSystemPower(None, byref(port), self._callback, byref(notifier))
        if not self._root:
            log.info("IOKit does not tell of sleep, it is seen only by the host's clock")
            return False
        stack.callback(iokit.IONotificationPortDestroy, port)
        stack.callback(iokit.IOServiceClose, self._root)
        stack.callback(iokit.IODeregisterForSystemPower, byref(notifier))
        source, run_loop = iokit.IONotificationPortGetRunLoopSource(port), cf.CFRunLoopGetCurrent()
        cf.CFRunLoopAddSource(run_loop, source, mode)
        stack.callback(cf.CFRunLoopRemoveSource, run_loop, source, mode)
        return True

    def _heard(self, _refcon: int | None, _service: int, message: int, notification: int) -> None:
        """Called by the run loop; no exception may leave it, and no sleep may wait in vain."""
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
            log.exception("the power message %#x could not be handled", message)

    def _allow(self, notification: int) -> None:
        if status := self._iokit.IOAllowPowerChange(self._root, notification):
            log.warning("IOAllowPowerChange failed: %#x", status & 0xFFFFFFFF)

    def _sleep(self) -> None:
        too_late = threading.Event()

        async def pause() -> None:
            if not too_late.is_set():  # the event loop was busy, and the host has slept meanwhile
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
            log.debug("asked to end while the host is about to sleep")
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
