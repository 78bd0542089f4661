"""Work shared by processes that are started here."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing import connection, get_context, parent_process
from typing import Any

#: Seconds between calls of ``waiting``.
_PATIENCE = 1.0


def in_processes(
    function: Callable[..., Any], calls: Sequence[tuple], waiting: Callable[[], None] | None = None
) -> list[Any]:
    """``[function(*arguments) for arguments in calls]``, each call in a new process of its own.

    When a call fails, or this process is interrupted or dies, the others end at once.

    Args:
        function: of a module, as its name is what the process gets.
        calls: arguments, which can be pickled.
        waiting: called about once a second until all are done.

    Raises:
        ValueError, OSError: what a call raised.
        ChildProcessError: a process died, by a signal or an error that it has printed.
    """
    context = get_context("spawn")  # threads and CUDA do not survive a fork
    processes, receivers = [], []
    results: dict[int, Any] = {}
    try:
        for arguments in calls:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(sender, function, arguments))
            process.start()
            sender.close()  # so that the end of the process is the end of the pipe
            processes.append(process)
            receivers.append(receiver)
        while len(results) < len(calls):
            left = {receiver: n for n, receiver in enumerate(receivers) if n not in results}
            for number in [left[receiver] for receiver in connection.wait(left, _PATIENCE)]:  # type: ignore[index]
                try:
                    result = receivers[number].recv()
                except EOFError:
                    processes[number].join()
                    code = processes[number].exitcode
                    raise ChildProcessError(
                        f"process {number + 1} of {len(calls)} died with exit code {code}: "
                        "the same command goes on"
                    ) from None
                if isinstance(result, Exception):
                    raise result
                results[number] = result
            if waiting is not None:
                waiting()
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
    return [results[number] for number in range(len(calls))]


def _run(sender: connection.Connection, function: Callable[..., Any], arguments: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        result = function(*arguments)
    except (ValueError, OSError) as error:  # the user's mistakes, for the parent to report
        result = error
    sender.send(result)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
