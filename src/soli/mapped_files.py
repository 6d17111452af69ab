"""A mapped file that becomes shorter while it is in use ends the process with its name instead of a bare signal.

Linux answers an access behind the end of a mapped file with SIGBUS, in whichever thread it happens. No result can be
right any more then, so the handler writes one sentence and exits with status 1. Any other SIGBUS takes its former way.
"""

import ctypes
import os
import signal
import sys
from functools import cache
from pathlib import Path
from typing import Final

# In siginfo_t on 64-bit Linux; si_code is positive for a fault, which has an address.
_CODE_OFFSET: Final = 8
_ADDRESS_OFFSET: Final = 16
_SA_SIGINFO: Final = 4
_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _SigAction(ctypes.Structure):
    """`struct sigaction` of glibc and musl on 64-bit Linux."""

    _fields_ = (
        ("handler", _Handler),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


@cache
def name_files_that_shrink() -> None:
    """Install the handler, once; call it before a file is mapped."""
    if not sys.platform.startswith("linux") or ctypes.sizeof(ctypes.c_void_p) != 8:
        return
    libc = ctypes.CDLL(None)
    former = _SigAction()

    def handle(number: int, info: int, context: int) -> None:
        is_fault = ctypes.c_int.from_address(info + _CODE_OFFSET).value > 0
        file = mapped_file(ctypes.c_uint64.from_address(info + _ADDRESS_OFFSET).value) if is_fault else None
        if file is None:
            libc.sigaction(number, ctypes.byref(former), None)
            if not is_fault:
                os.kill(os.getpid(), number)  # an access is repeated by itself
            return
        message = f"soli: {file} became shorter while it was in use, or cannot be read any more: restore it\n"
        os.write(2, message.encode(errors="backslashreplace"))
        os._exit(1)

    _handlers.append(_Handler(handle))
    action = _SigAction(handler=_handlers[0], flags=_SA_SIGINFO)
    libc.sigaction(int(signal.SIGBUS), ctypes.byref(action), ctypes.byref(former))


_handlers: list[object] = []  # what the system calls must stay in memory


def mapped_file(address: int) -> str | None:
    """The file that is mapped at an address of this process; None where there is none."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        fields = line.split(maxsplit=5)
        start, _, end = fields[0].partition("-")
        if int(start, 16) <= address < int(end, 16):
            return fields[5] if len(fields) == 6 and fields[5].startswith("/") else None
    return None
