"""A process that answers requests: a line of JSON each way, and its death named.

Replies come on a file descriptor of their own, whose number is the last word of its command. This
module needs no other of the package, so that programs of any version can load it as a file.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_CLOSING_SECONDS = 10.0

Answer = Callable[[Mapping[str, Any], Callable[[Any], None]], Any]
"""Takes a request and what sends notes of its progress; returns the answer."""


class ChildError(Exception):
    """A request failed in the child; ``kind`` is its error's class, empty if the process ended."""

    def __init__(self, message: str, *, kind: str = "", killed: bool = False) -> None:
        super().__init__(message)
        self.kind, self.killed = kind, killed  # by the system


class ChildProcess:
    """A child; nothing else may read its replies."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str] | None = None) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - read when the child has ended
        reading, writing = os.pipe()
        try:
            self._child = subprocess.Popen(
                [*command, str(writing)],
                stdin=subprocess.PIPE,
                stdout=self._errors,
                stderr=self._errors,
                pass_fds=(writing,),
                env=env,
                start_new_session=True,  # Ctrl-C is for the parent, which ends its children itself
            )
        except OSError:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        self._replies = os.fdopen(reading, encoding="utf-8")
        self.number = self._child.pid

    def request(
        self, action: str, on_note: Callable[[Any], None] = lambda note: None, **values: Any
    ) -> Any:
        """Ask for something and return the answer."""
        try:
            assert self._child.stdin is not None
            self._child.stdin.write((json.dumps({"do": action, **values}) + "\n").encode())
            self._child.stdin.flush()
            while line := self._replies.readline():
                reply = json.loads(line)
                if "note" not in reply:
                    break
                on_note(reply["note"])
        except (OSError, ValueError) as error:
            raise self._ended() from error
        if not line:
            raise self._ended()
        if "error" in reply:
            raise ChildError(reply["error"], kind=reply["kind"])
        return reply["answer"]

    def close(self) -> None:
        """End it: by itself if it answers, else by force. Calling it twice is harmless."""
        if self._replies.closed:
            return
        assert self._child.stdin is not None
        with contextlib.suppress(OSError):
            self._child.stdin.close()
        try:
            self._child.wait(_CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._replies.close()
        self._errors.close()

    def kill(self) -> None:
        """End it at once, in the middle of whatever it does."""
        self._child.kill()
        self.close()

    def _ended(self) -> ChildError:
        """How the process ended, with the last line that it printed."""
        try:
            code = self._child.wait(_CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            return ChildError("its process does not answer. It is ended.")
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        said = f" Its last words: {lines[-1][:200]}" if lines else ""
        if code >= 0:
            return ChildError(f"its process ended with exit status {code}.{said}")
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        hint = " The system does so when memory runs out." if name == "SIGKILL" else ""
        return ChildError(f"its process was killed by {name}.{hint}{said}", killed=bool(hint))


def answer_requests(answer: Answer) -> None:
    """Answer a parent's requests until it closes standard input."""
    with os.fdopen(int(sys.argv[-1]), "w", encoding="utf-8") as replies:

        def reply(**content: Any) -> None:
            replies.write(json.dumps(content, default=vars) + "\n")  # also dataclasses
            replies.flush()

        for line in sys.stdin:
            try:
                result = answer(json.loads(line), lambda note: reply(note=note))
            except Exception as error:  # noqa: BLE001 - whatever it is, the other side reports it
                reply(error=f"{error}" or repr(error), kind=type(error).__name__)
            else:
                reply(answer=result)
