from __future__ import annotations

import torch

from dti_ray.train.host import settle, training_device


def test_threads_are_set_on_cpus() -> None:
    before = torch.get_num_threads()
    try:
        settle(torch.device("cpu"), threads=1)
        assert torch.get_num_threads() == 1
        settle(torch.device("cpu"))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_the_device_is_the_gpu_where_there_is_one() -> None:
    assert (training_device().type == "cuda") == torch.cuda.is_available()
