"""What a program may ask of ckpt. `ckpt api python > ckpt.py` writes this module.

It needs nothing but ctypes. In a program that was started by `ckpt run --backend preload`, it finds ckpt in the process; in
any other `available()` is False, regions and hooks do nothing, and `now()` raises an OSError with errno ENOTSUP.

Importing it makes the program one that is asked before each dump, with whichever backend that is made.

    import ckpt

    with ckpt.uninterrupted():      # no checkpoint happens in here
        ...

    @ckpt.before                    # runs before each checkpoint
    def flush():
        log.flush()

    @ckpt.after                     # and after it: ckpt.SAVED, ckpt.RESTORED or ckpt.FAILED
    def reconnect(outcome):
        if outcome == ckpt.RESTORED:
            connection.open()

    if ckpt.now() == ckpt.RESTORED: # the whole job is saved
        ...
    ckpt.restored()                 # how many times this process has come out of an image

License: MIT OR Apache-2.0
"""

import atexit
import ctypes
import errno
import os
import sys
import threading

__all__ = ["FAILED", "SAVED", "RESTORED", "after", "available", "before", "now", "remove", "restored", "uninterrupted"]

#: There is no image, and the program goes on.
FAILED = -1
#: There is an image, and the program goes on.
SAVED = 0
#: This process has come out of the image.
RESTORED = 1

_BEFORE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_AFTER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p)
_PLAIN = ctypes.CFUNCTYPE(ctypes.c_int)


class _Interface(ctypes.Structure):
    _fields_ = [
        ("version", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("attach", _PLAIN),
        ("restored", _PLAIN),
        ("enter", _PLAIN),
        ("leave", _PLAIN),
        ("now", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)),
        ("add", ctypes.CFUNCTYPE(ctypes.c_int, _BEFORE, _AFTER, ctypes.c_void_p)),
        ("remove", ctypes.CFUNCTYPE(ctypes.c_int, _BEFORE, _AFTER, ctypes.c_void_p)),
    ]


def _find():
    try:
        found = _Interface.in_dll(ctypes.CDLL(None), "ckpt_interface_v1")
    except (ValueError, OSError):
        return None
    found.attach()
    return found


_interface = _find()
_depth = threading.local()
_hooks = {}


def _check(result):
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def available():
    """Whether ckpt can save this program and hears it."""
    return _interface is not None


def restored():
    """How many times this process has come out of an image. A child of fork inherits the number."""
    return _check(_interface.restored()) if _interface else 0


def now(image=None):
    """Has the whole tree of the job saved, and waits for it. SAVED, or RESTORED in a process that came out of an image.

    `image` is a directory that ckpt makes, as of `ckpt dump -D`; without one it is the next of the job's own (`ckpt run -D`).

    Raises OSError, with errno ENOTSUP where there is no ckpt, ENOTCONN where none waits for the job (`ckpt run`, or
    `ckpt restore` without --detach, does), and others as in ckpt.h. RuntimeError in a region of this thread.
    """
    if getattr(_depth, "value", 0):
        raise RuntimeError("ckpt.now() inside of ckpt.uninterrupted(), which it would wait for")
    if not _interface:
        raise OSError(errno.ENOTSUP, "this program does not run under ckpt")
    return _check(_interface.now(None if image is None else os.fsencode(image)))


class uninterrupted:
    """A region in which no checkpoint happens: a context manager, and a decorator. It nests, and may be used by all threads.

    A dump waits until all regions of the process were left, for as long as its --timeout says. If a checkpoint has begun,
    entering waits for its end; so do not enter while you hold a lock that a hook takes.
    """

    def __enter__(self):
        if _interface:
            _check(_interface.enter())
        _depth.value = getattr(_depth, "value", 0) + 1
        return self

    def __exit__(self, *_):
        _depth.value -= 1
        if _interface:
            _check(_interface.leave())
        return False

    def __call__(self, function):
        def wrapper(*arguments, **named):
            with uninterrupted():
                return function(*arguments, **named)

        wrapper.__name__ = getattr(function, "__name__", "uninterrupted")
        wrapper.__doc__ = function.__doc__
        wrapper.__wrapped__ = function
        return wrapper


def _add(function, before, after):
    if _interface:
        _check(_interface.add(before, after, None))
    # Whatever C may call must stay.
    _hooks.setdefault(function, []).append((before, after))
    return function


def before(function):
    """Has a function run before each checkpoint; the last that was added is the first to run. An exception refuses it.

    It runs in a thread of its own, the same for all hooks, while the other threads run and nobody is in a region.
    A child of fork has no hooks.
    """

    def call(_):
        try:
            function()
            return 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
            return 1

    return _add(function, _BEFORE(call), _AFTER())


def after(function):
    """Has a function run after each checkpoint, with SAVED, RESTORED or FAILED; the first that was added runs first."""

    def call(outcome, _):
        try:
            function(outcome)
        except BaseException:
            sys.excepthook(*sys.exc_info())

    return _add(function, _BEFORE(), _AFTER(call))


def remove(function):
    """Removes a hook. When it returns, it does not run any more."""
    for before, after in _hooks.pop(function):
        if _interface:
            _interface.remove(before, after, None)


@atexit.register
def _remove_all():
    for function in list(_hooks):
        remove(function)


def _forget():
    # Of the parent: this process has none, and must not wait for any.
    _hooks.clear()


os.register_at_fork(after_in_child=_forget)
