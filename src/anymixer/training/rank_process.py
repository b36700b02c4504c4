"""What a rank tells of its process so that others can find it, and what becomes of that process."""

import os
from pathlib import Path

import psutil

from anymixer.training.rank_verdict import Beat


def machine() -> str:
    """The name space that this process's id means something in; "" where there is none to be known.

    The outermost one has the same number everywhere, and machines that were cloned the same name.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def born(process: psutil.Process) -> float:
    """Seconds after the start of the machine, which setting its clock does not change."""
    return process.create_time() - psutil.boot_time()


def condition_of(mine: Beat, beat: Beat) -> str | None:
    """What became of a process of this machine: "gone", "stopped" or "running"; None if that cannot be known here."""
    if not mine.machine or beat.machine != mine.machine:
        return None
    try:
        process = psutil.Process(beat.pid)
        if abs(born(process) - beat.born) > 1 or process.status() == psutil.STATUS_ZOMBIE:
            return "gone"
        return "stopped" if process.status() == psutil.STATUS_STOPPED else "running"
    except psutil.NoSuchProcess:
        return "gone"
    except psutil.AccessDenied:
        return None
