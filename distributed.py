"""Several processes, one a GPU, that train one model. torchrun starts them; without it nothing here does anything.

    torchrun --nproc_per_node=4 train.py --task libero_object

Every process holds all models and data. All of them draw the same random numbers, for the whole batch, and compute with
their own rows of it; gradients are added up. So N processes learn what one does, up to the order of sums. Only dropout
draws differ. Episodes are shared out whole and kept by whoever plays them; all else rank 0 alone writes and says.

At the end: the helpers, one a core, in which simulators run.
"""
from __future__ import annotations

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from datetime import timedelta
from functools import partialmethod

import torch
import torch.distributed as dist
from tqdm import tqdm


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def start():
    """Join the processes that torchrun has started: NCCL adds up what lies on GPUs, gloo all else."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(days=1))
    if rank():
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)


def shard(items):
    """This process's part of a list: neighbours; the parts' lengths differ by one at most."""
    here, count = rank(), world_size()
    return items[len(items) * here // count:len(items) * (here + 1) // count]


def gather(value) -> list:
    """Everyone's value, by rank. Small things: they are pickled and go over the CPU."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def barrier():
    """Wait for everyone."""
    gather(None)  # on the CPU: NCCL's own barrier gives up after ten minutes


def sum_gradients(parameters):
    """Add everyone's gradients up. A parameter that nobody has a gradient for keeps none, so that it stays as it is."""
    if world_size() == 1:
        return
    parameters = [p for p in parameters if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    used = grads[0].new_tensor([p.grad is not None for p in parameters])
    flat = torch.cat([*(grad.flatten() for grad in grads), used])  # one message instead of hundreds
    dist.all_reduce(flat)
    *sums, used = flat.split([*(p.numel() for p in parameters), len(parameters)])
    for p, total, count in zip(parameters, sums, used.tolist()):
        p.grad = total.view_as(p) if count else None


def first_to_fail() -> bool:
    """True in the first process that asks. It tells the user what went wrong; the others break off because it ended."""
    if not dist.is_initialized():
        return True
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:  # the store has gone with its process
        return False


@contextmanager
def light_children():
    """Processes started inside use one BLAS thread each: with one process a core, more only get in the way. And they do not
    import the script that starts them, which takes seconds: what they run must be in a module of its own."""
    main = vars(sys.modules["__main__"])
    script, names = main.pop("__file__", None), ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        main |= {"__file__": script} if script else {}
        for name in names:
            del os.environ[name]
        os.environ |= before


def in_processes(function, arguments, num_procs, name, unit):
    """Call a top-level function with every tuple of arguments, one process a core, under a progress bar."""
    with light_children(), ProcessPoolExecutor(
            num_procs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(function, *values) for values in arguments]
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc=name, unit=unit):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # those in the queue are not waited for
            raise
