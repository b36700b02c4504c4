"""Stacks in words."""

import threading

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from anymixer.training.whereabouts import SAVING, describe, main_thread, where_raised


class Asking(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return str(in_another_thread())


class AskingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        AskingBackward.found = main_thread()
        return gradient


def in_another_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(main_thread()))
    thread.start()
    thread.join()
    return found[0]


def test_a_batch_that_is_fetched():
    ((answer,),) = list(DataLoader(Asking()))
    assert answer.startswith("waiting for a batch from the data loader (")


def test_backward():
    AskingBackward.apply(torch.ones(1, requires_grad=True)).sum().backward()
    assert AskingBackward.found.words == "backward and its exchange of gradients" and not AskingBackward.found.waits


def test_what_is_not_known_names_the_line():
    found = in_another_thread()
    assert found.words == "its own work" and found.place.startswith("threading.py:")


def test_a_collective_waits(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", world_size=1, rank=0)
    try:
        torch.distributed.broadcast("no tensor", src=0)
    except TypeError as error:
        found = where_raised(error)
    finally:
        torch.distributed.destroy_process_group()
    assert found.waits and found.words.startswith("waiting for the other ranks, in ")


def test_an_error_that_was_never_raised_is_nowhere():
    assert where_raised(ValueError()) is None


@pytest.mark.parametrize("file", ["utils/checkpoint.py", "utils/remote_uploader.py", "callbacks/checkpoint_saver.py"])
def test_a_checkpoint_takes_until_it_is_uploaded(file):
    found = {}
    exec(compile("import sys\nframe = sys._getframe()", f"/site-packages/composer/{file}", "exec"), found)
    assert describe(found["frame"]).words == SAVING
