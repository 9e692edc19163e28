"""The processes that train one flow together, as torchrun starts them. A process on its own has no peers, and nothing
here communicates then."""

import os
import sys
import warnings
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import is_torchelastic_launched
from torch.nn.parallel import DistributedDataParallel

from .cli import UserError

PATIENCE = timedelta(days=7)  # for those that wait while another one prepares data


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
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if self.size > 1:
            store, rank, size = next(dist.rendezvous("env://"))
            if os.environ["GROUP_WORLD_SIZE"] == "1":  # one machine; elsewhere the numbers of restarts may differ
                # A restarted job gets the same store, with the addresses of processes that are no more.
                store = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size)
            self._waiting = dist.new_group(backend="gloo", timeout=PATIENCE)
            self._control = dist.new_group(backend="gloo")  # messages between hosts

    @property
    def first(self):
        """Whether this process writes files and logs."""
        return self.rank == 0

    def rows(self, batch_size, rank=None):
        """The part of a global batch, a slice, of process `rank`, or of this one.

        Raises UserError unless all parts are equal.
        """
        part, rest = divmod(batch_size, self.size)
        if rest:
            raise UserError(f"--batch_size {batch_size}: must be divisible by the {self.size} processes")
        rank = self.rank if rank is None else rank
        return slice(rank * part, (rank + 1) * part)

    def one_per_machine_first(self, function):
        """function() in the first process of each machine, then in the others."""
        if self.local_rank == 0:
            result = function()
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
        """Raises UserError unless the dict `own`, which says what this process trains, is that of the first process."""
        first = self.broadcast(own)
        different = [f"{name} {first[name]} -> {own[name]}" for name in own if own[name] != first[name]]
        if different:
            raise UserError(f"process {self.rank}: not the run of process 0 ({'; '.join(different)})")

    def broadcast_(self, tensors):
        """With peers: make each tensor that of the first process."""
        for tensor in tensors:
            dist.broadcast(tensor, src=0)

    def sum_(self, tensor):
        """Make a tensor on the device the sum over all processes; returns it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def parallel(self, module):
        """With peers: a module whose gradients are means over all processes, with the first one's parameters."""
        with warnings.catch_warnings():
            # From torch 2.14 on the first flag has another name, which 2.8 does not know.
            warnings.simplefilter("ignore", FutureWarning)
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

    def leave(self):
        """Leave the group of processes. All must call it at the same point."""
        if self._agreement:
            self._agreement[1].wait()
        if self.size > 1:
            dist.destroy_process_group()


@contextmanager
def together(device):
    """The `Peers` of this process. Raises UserError where a message between them fails, since one has ended."""
    peers = None
    try:
        peers = Peers(device)
        yield peers
        peers.leave()
    except RuntimeError as error:
        words = ("gloo", "NCCL", "onnect", "ProcessGroup", "process group")
        failed_message = isinstance(error, dist.DistError) or any(word in str(error) for word in words)
        if (peers and peers.size == 1) or not failed_message:
            raise
        raise UserError(
            f"process {os.environ.get('RANK', 0)}: another process of the run has ended or cannot be reached;"
            f" nothing is saved here ({str(error).splitlines()[0]})"
        ) from error


def launch(processes, argv):
    """Become torchrun, which runs this script with flags `argv` in `processes` processes on this machine."""
    from torch.distributed.run import get_args_parser

    known = get_args_parser().format_help()  # torch 2.8 has neither of these
    wanted = ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--shutdown-timeout=240"]
    options = ["--standalone", f"--nproc_per_node={processes}"]
    options += [option for option in wanted if option.partition("=")[0] in known]
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *options, sys.argv[0], *argv])
