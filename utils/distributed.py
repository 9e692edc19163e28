"""The processes that train one flow together, started by torchrun. A single process does not communicate."""

import os
import re
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import is_torchelastic_launched

from .cli import UserError

PATIENCE = timedelta(days=7)  # of processes that wait until the data are prepared


class Peers:
    """All processes of the run, as this one sees them.

    rank, local_rank, size: number of this process among all and among those of its machine, number of all
    first: whether this process writes files and logs
    device: where it computes
    """

    def __init__(self, device):
        self.device, self._agreement = device, None
        self.rank, self.local_rank, self.size = 0, 0, 1
        if is_torchelastic_launched():
            names = "RANK", "LOCAL_RANK", "WORLD_SIZE"
            self.rank, self.local_rank, self.size = (int(os.environ[name]) for name in names)
        self.first = self.rank == 0
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if self.size > 1:
            store, rank, size = next(dist.rendezvous("env://"))
            if os.environ["GROUP_WORLD_SIZE"] == "1":  # one machine; between machines, numbers of restarts may differ
                # A restarted job gets the old store, with the addresses of ended processes.
                store = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size)
            self._waiting = dist.new_group(backend="gloo", timeout=PATIENCE)
            self._control = dist.new_group(backend="gloo")  # messages between hosts

    def rows(self, batch_size, rank=None):
        """The slice of a global batch for process `rank`, by default this one. Raises UserError for unequal slices."""
        part, rest = divmod(batch_size, self.size)
        if rest:
            raise UserError(f"--batch_size {batch_size}: must be divisible by the {self.size} processes")
        rank = self.rank if rank is None else rank
        return slice(rank * part, (rank + 1) * part)

    def one_per_machine_first(self, function):
        """function(), in the first process of each machine before the others."""
        result = function() if self.local_rank == 0 else None
        if self.size > 1:
            dist.barrier(self._waiting)
        return result if self.local_rank == 0 else function()

    def broadcast(self, value):
        """The first process's number, string, list or dict."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, group=self._control)
        return values[0]

    def check_equal(self, own):
        """Raises UserError unless the dict `own`, the settings of this process, is that of the first process."""
        first = self.broadcast(own)
        different = [f"{name} {first[name]} -> {own[name]}" for name in own if own[name] != first[name]]
        if different:
            raise UserError(f"process {self.rank}: not the run of process 0 ({'; '.join(different)})")

    def broadcast_(self, tensors):
        """Overwrite tensors by those of the first process. Only with several processes."""
        for tensor in tensors:
            dist.broadcast(tensor, src=0)

    def sum_(self, tensor):
        """Overwrite a tensor on the device by its sum over all processes; returns it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, number):
        """The largest `number` of all processes; None stands for 0. With several processes it is that of the previous
        call, so that no process waits for the message."""
        if self.size == 1:
            return number
        before, largest = self._agreement, torch.tensor(number or 0)
        self._agreement = largest, dist.all_reduce(largest, dist.ReduceOp.MAX, self._control, async_op=True)
        if before is None:
            return None
        before[1].wait()
        return int(before[0]) or None

    def leave(self):
        """Leave the group of processes, all at the same point."""
        if self._agreement:
            self._agreement[1].wait()
        if self.size > 1:
            dist.destroy_process_group()


@contextmanager
def together(device):
    """The `Peers` of this process. Raises UserError if a message between processes fails because one has ended."""
    peers = None
    try:
        peers = Peers(device)
        yield peers
        peers.leave()
    except RuntimeError as error:
        words = "gloo|NCCL|onnect|ProcessGroup|process group"
        failed_message = isinstance(error, dist.DistError) or re.search(words, str(error))
        if (peers and peers.size == 1) or not failed_message:
            raise
        raise UserError(
            f"process {os.environ.get('RANK', 0)}: another process of the run has ended or cannot be reached;"
            f" nothing is saved here ({str(error).splitlines()[0]})"
        ) from error


def launch(processes, argv):
    """Replace this process by torchrun, which runs the script with flags `argv` in several processes."""
    from torch.distributed.run import get_args_parser

    known = get_args_parser().format_help()  # torch 2.8 has neither of these
    wanted = ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--shutdown-timeout=240"]
    options = ["--standalone", f"--nproc_per_node={processes}"]
    options += [option for option in wanted if option.partition("=")[0] in known]
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *options, sys.argv[0], *argv])
