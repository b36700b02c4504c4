"""A worker process ends with the process that started it, whatever it waits for."""

import os
import signal
import subprocess
import sys

import pytest

PARENT = """
import multiprocessing, os, time
from anymixer.data.worker_process import end_with

def wait(parent):
    end_with(parent, 0)
    print(os.getpid(), flush=True)
    time.sleep(600)

multiprocessing.get_context("fork").Process(target=wait, args=(os.getpid(),)).start()
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own signal is Linux's")
def test_a_killed_run_leaves_no_worker(child_environment):
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert int(parent.stdout.readline()) > 0
    os.kill(parent.pid, signal.SIGKILL)
    # The worker holds the pipe's other end: the pipe ends with the worker, or never.
    assert parent.communicate(timeout=100)[0] == ""
