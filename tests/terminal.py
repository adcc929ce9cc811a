"""A terminal for the tests: a pseudo-terminal whose output is kept, and a screen that understands what the live view sends."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import termios
import threading


class PseudoTerminal:
    """Both ends of a terminal of a certain size; what is written to `slave` is gathered from the other end."""

    def __init__(self, columns: int = 80, rows: int = 30):
        self.master, self.slave = pty.openpty()
        self.resize(columns, rows)
        self._output = b""
        self._thread = threading.Thread(target=self._gather, daemon=True)
        self._thread.start()

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _gather(self) -> None:
        while True:
            try:
                piece = os.read(self.master, 65536)
            except OSError:  # the other end is closed
                return
            if not piece:
                return
            self._output += piece

    def close(self) -> str:
        """Close it; all that was written."""
        os.close(self.slave)
        self._thread.join(timeout=10)
        os.close(self.master)
        return self._output.decode()


def screen(output: str, columns: int = 80) -> list[str]:
    """The lines that `output` leaves on a terminal without a bottom: text, wrapping, CR, LF, cursor up, erase below, colours.

    Raises:
        AssertionError: for any other control sequence.
    """
    lines, row, column = [""], 0, 0
    for match in re.finditer(r"\x1b\[(\d*)([A-Za-z])|\x1b\[[\d;]*m|(\r)|(\n)|([^\x1b\r\n])|(.)", output):
        count, letter, carriage, newline, character, other = match.groups()
        assert other is None, f"{other!r} in {output[match.start() : match.start() + 10]!r}"
        if letter == "A":
            row = max(0, row - int(count or 1))
        elif letter == "J":
            lines[row:] = [lines[row][:column]]
        elif letter is not None:
            assert letter == "m", match[0]
        elif carriage:
            column = 0
        elif newline:
            row += 1
        elif character:
            if column == columns:
                row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
            lines[row] = lines[row][:column].ljust(column) + character + lines[row][column + 1 :]
            column += 1
        lines += [""] * (row + 1 - len(lines))
    return [line.rstrip() for line in lines]
