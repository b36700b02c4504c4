"""What a data loader's worker process does before its first batch."""

import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with(parent: int, worker: int) -> None:
    """Have the kernel end this process with its parent's, whose process id is given.

    torch's workers look for their parent between batches alone; one that waits for other workers inside streaming when
    the run is killed would wait for ever, with the run's shared memory and open files.
    """
    if sys.platform != "linux":
        return  # torch's own look has to do
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before the kernel knew
        os._exit(1)
