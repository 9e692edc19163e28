"""Receptive fields of latents (sections 3.4 and 4.4): means of |dG / dz_l| over draws of z, summed over colours. G is
the generator, with images in model space. A file keeps the fields until something that they depend on changes."""

import inspect
from dataclasses import dataclass

import torch

from utils.cache import cached, digest
from utils.cli import UserError
from utils.random import generator

from .jacobian import receptive_fields

MOST_ENTRIES = 2**28  # of fields computed unless asked for, 1 GiB in float32
SUBSET = 16  # latents per level where all are too many, or where each takes a pass, as in Real NVP


@dataclass
class Fields:
    """Receptive fields of S latents, on the CPU."""

    latents: torch.Tensor  # (S, 3) integers: channel, row, column
    levels: torch.Tensor  # (S,) integers
    fields: torch.Tensor  # (S, L, L)
    totals: list  # latents that the flow has at each level

    def __post_init__(self):
        self.strengths = self.fields.mean((1, 2))  # over the pixels: (S,)

    @property
    def reaches(self):
        """How far the fields reach, in pixels: (S,) in float64, nan for a field that is 0 everywhere. For pixels p and
        q drawn in proportion to a field, sqrt(E |p - q|^2 / 2), where opposite borders touch, as the disentanglers join
        them; of a field away from the border, the root-mean-square distance of its weight from its centre."""
        squares, places = 0, torch.arange(L := self.fields.shape[-1], dtype=torch.float64)
        apart = (places - places[:, None]).abs()
        apart = torch.minimum(apart, L - apart).square()
        for axis in (1, 2):
            shares = self.fields.sum(axis).double()
            shares /= shares.sum(1, keepdim=True)  # of the weight in each column, then row: (S, L)
            squares += ((shares @ apart) * shares).sum(1) / 2
        return squares.sqrt()

    def name(self, k):
        c, i, j = self.latents[k].tolist()
        return f"{self.levels[k]}:{i}:{j}:{c}"

    def of_level(self, h):
        """The numbers of the fields of a level: (s,)."""
        return (self.levels == h).nonzero()[:, 0]

    def strongest(self, h, number):
        """The numbers of the strongest fields of level h, in falling order."""
        at_level = self.of_level(h)
        return at_level[self.strengths[at_level].argsort(descending=True, stable=True)[:number]]


def get_fields(flow, config, folder, n, seed, temperatures=None, latents=None, subset=None, weights="a flow"):
    """The Fields of a flow and its config, from the file `receptive_fields_….cache` of a folder if they are there.
    Raises UserError, naming the file `weights`, if a field is not finite.

    n, temperatures: draws of z, and their temperature at each level, None for 1
    latents: (channel, row, column) of each; None: `subset` random ones of each level, by default all if they are few
    """
    if latents is None:
        few = flow.layers() and flow.nchannels * flow.L**4 <= MOST_ENTRIES
        latents = choose_latents(flow, subset or (None if few else SUBSET), seed)
    latents, temperatures = torch.as_tensor(latents), temperatures or (1.0,) * flow.num_levels
    # A flow's type and sizes say what its parameters mean, the device which numbers a seed gives.
    settings = {name: config[name] for name in ("model", "dtype", *inspect.signature(type(flow)).parameters)}
    device = flow.level_map.device
    key = digest(flow.state_dict(), settings, latents, n, seed, temperatures, device.type)
    given = flow, n, latents, temperatures, generator(seed, "receptive fields", 0, device)
    fields = cached(f"{folder}/receptive_fields_{key}.cache", lambda: receptive_fields(*given, progress=True))
    if not fields.isfinite().all():
        raise UserError(f"{weights}: its receptive fields are not finite")
    level_map = flow.level_map.cpu()
    return Fields(latents, level_map[latents.unbind(1)], fields, level_map.flatten().bincount().tolist())


def choose_latents(flow, number, seed):
    """Latents (S, 3), channel, row, column, level by level: `number` random ones of each, all if None."""
    chosen = []
    for h in range(flow.num_levels):
        latents = (flow.level_map.cpu() == h).nonzero()
        order = torch.randperm(len(latents), generator=generator(seed, "computed fields", h))
        chosen.append(latents[order[:number].sort().values])
    return torch.cat(chosen)
