"""The processes that train one flow together, as torchrun starts them. A process on its own has no peers, and then
nothing here communicates."""

import os
import sys
import warnings
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import is_torchelastic_launched
from torch.distributed.run import get_args_parser
from torch.nn.parallel import DistributedDataParallel

PATIENCE = timedelta(days=7)  # for those that wait while another one prepares data


class PeerError(Exception):
    """Another process of the run cannot be reached; the message is one sentence for the user."""


class Peers:
    """rank, local_rank: number of this process among all and among those of this machine
    size: number of processes

    device: where this process computes
    """

    def __init__(self, device):
        launched = is_torchelastic_launched()
        self.rank, self.local_rank, self.size = (
            int(os.environ[name]) if launched else alone
            for name, alone in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
        )
        self.device = device
        self._agreement = None
        if self.size > 1:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            store, rank, size = next(dist.rendezvous("env://"))
            if os.environ["GROUP_WORLD_SIZE"] == "1":  # one machine; elsewhere the numbers of restarts may differ
                # A restarted job gets the same store, with the addresses of processes that are no more.
                store = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size)
            self._control = dist.new_group(backend="gloo", timeout=PATIENCE)  # messages between hosts

    @property
    def first(self):
        """Whether this process writes files and logs."""
        return self.rank == 0

    def rows(self, batch_size, rank=None):
        """The part of a global batch, a slice, of process `rank`, or of this one.

        Raises ValueError unless all parts are equal.
        """
        part, rest = divmod(batch_size, self.size)
        if rest:
            raise ValueError(f"batch_size {batch_size}: must be divisible by the {self.size} processes")
        rank = self.rank if rank is None else rank
        return slice(rank * part, (rank + 1) * part)

    def one_per_machine_first(self, function):
        """function() in the first process of each machine, then in the others."""
        if self.local_rank == 0:
            result = function()
        if self.size > 1:
            dist.barrier(self._control)
        return result if self.local_rank == 0 else function()

    def broadcast(self, value):
        """The first process's number, string, list or dict."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, group=self._control)
        return values[0]

    def broadcast_(self, tensors):
        """Make each tensor that of the first process."""
        for tensor in tensors if self.size > 1 else []:
            dist.broadcast(tensor, src=0)

    def sum_(self, tensor):
        """Make a tensor on the device the sum over all processes; returns it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def parallel(self, module):
        """A module whose gradients are the means over all processes; their parameters become the first one's."""
        if self.size == 1:
            return module
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # torch 2.14 has another name for the first flag, 2.8 has not
            return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)

    def agree(self, number):
        """The largest `number` (None counts as 0) of all processes, None for 0. With peers it is that of their call
        before this one, so that nobody waits for the message."""
        if self.size == 1:
            return number
        before, largest = self._agreement, torch.tensor(number or 0)
        self._agreement = largest, dist.all_reduce(largest, dist.ReduceOp.MAX, self._control, async_op=True)
        if before is None:
            return None
        before[1].wait()
        return int(before[0]) or None

    @contextmanager
    def together(self):
        """Leaves the group of processes at the end. Raises PeerError where a message fails, since a peer has ended."""
        try:
            yield
            if self._agreement:
                self._agreement[1].wait()
        except RuntimeError as error:
            words = ("gloo", "NCCL", "onnect", "ProcessGroup", "process group")
            if self.size == 1 or not (isinstance(error, dist.DistError) or any(word in str(error) for word in words)):
                raise
            raise PeerError(
                f"process {self.rank} of {self.size}: another process of the run has ended or cannot be reached;"
                f" nothing is saved here ({str(error).splitlines()[0]})"
            ) from error
        if self.size > 1:
            dist.destroy_process_group()


def launch(processes, argv):
    """Become torchrun, which runs this script with flags `argv` in `processes` processes on this machine."""
    options = ["--standalone", f"--nproc_per_node={processes}"]
    if "--signals-to-handle" in get_args_parser().format_help():  # torch 2.8 has no such option
        options.append("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *options, sys.argv[0], *argv])
