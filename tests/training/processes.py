"""Processes of their own, so that they can be killed as the kernel kills; forked from one that has imported all."""

import contextlib
import multiprocessing
import os
import signal
import sys

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([f"{__package__}.preloaded"])  # what it imports is imported once

SYSTEM_CALLS = {"open", "close", "fsync", "mkdir", "replace", "rmdir", "serialize_file", "unlink", "write"}


def run(function, *arguments, until=None):
    """The exit code of a process that calls a function; negative of a signal. It is killed once `until()` is true."""
    process = CONTEXT.Process(target=function, args=arguments)
    process.start()
    while until is not None and process.is_alive() and not until():
        process.join(0.01)
    if until is not None:
        process.kill()
    process.join()
    return process.exitcode


@contextlib.contextmanager
def killed_at(call):
    """Within, this process is killed when it is about to make its system call of this number, counted from 0."""
    made = 0

    def watch(frame, event, function):
        nonlocal made
        if event == "c_call" and function.__name__ in SYSTEM_CALLS:
            if made == call:
                os.kill(os.getpid(), signal.SIGKILL)
            made += 1

    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(None)
