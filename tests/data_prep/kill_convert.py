"""A conversion that kills itself, as by `kill -9`: `python kill_convert.py STAGE SECONDS ARGUMENTS`.

STAGE: "start", "tokenizer" (trains it), "hashes" (looks for copies) or "units" (converts them). It dies SECONDS after
the stage has begun, and at the latest before it writes its manifest: killed by the clock of another process, it would
have finished on a busy machine, or not have begun.
"""

import os
import signal
import sys
import threading

from anymixer.entry_point import run
from data_prep import convert, unit_work


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm_at(stage: str, seconds: float) -> None:
    """Let a thread do it, at any moment of the stage."""

    def arm() -> None:
        threading.Timer(seconds, die).start()

    if stage == "start":
        arm()
        return
    name = "train_wordpiece" if stage == "tokenizer" else "run_units"
    work = {"hashes": unit_work.hash_unit, "units": unit_work.convert_unit}.get(stage)
    real = getattr(convert, name)

    def begin(*arguments):
        if work is None or arguments[0] is work:
            arm()
        return real(*arguments)

    setattr(convert, name, begin)


def die_before_the_manifest(event: str, arguments: tuple) -> None:
    """An audit hook; moving a file is an event."""
    if event == "os.rename" and os.fspath(arguments[1]).endswith("/manifest.json"):
        die()


if __name__ == "__main__":
    arm_at(sys.argv[1], float(sys.argv[2]))
    sys.addaudithook(die_before_the_manifest)
    sys.exit(run(convert.main, sys.argv[3:]))
