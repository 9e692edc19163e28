"""Inpainting (sections 3.5 and 4.6, Appendix F): corrupted pixels from the rest of the image.

All in model space. The latents z_g start at the encoding of the corrupted image; some of them are free. The region that
z_g decodes to is pasted into the image, and Adam moves the free latents to where log p of the pasted image is largest.
`WholeFlow` does this with any flow and free latents. RG-Flow needs only the region's inference cone: its latents alone
determine the region, and a changed region alters nothing outside the cone. So `CausalCone` evaluates O(log L) of O(L^2)
blocks, and the old content of the region does not matter.
"""

from collections import namedtuple
from contextlib import suppress

import torch

from layers.fold import folded_together
from utils.graphs import captured

from . import hierarchy
from .preprocess import to_image, to_model, to_uint8


class WholeFlow:
    """The likelihood of pasted images as a function of the free latents, by evaluating all of a flow.

    flow: any Flow
    x: (B, C, L, L) corrupted images; regions: (B, L, L) bool, their corrupted pixels
    free: (F,) the free latents, as positions in the flattened x, the order of `values`; image: (F,) whose each is
    """

    @torch.no_grad()
    def __init__(self, flow, x, regions, free):
        self.flow, self.x, self.regions, self.free = flow, x, regions[:, None], free
        self.image = free // x[0].numel()
        self.z = flow(x)[0].flatten()

    def paste(self, values):
        """The images (B, C, L, L), with what `values` (F,) of the free latents decode to in the regions."""
        z = self.z.index_copy(0, self.free, values).reshape(self.x.shape)
        return torch.where(self.regions, self.flow.inverse(z)[0], self.x)

    def log_prob(self, values):
        """log p of the pasted images, nats: (F,) -> (B,)."""
        return self.flow.log_prob(self.paste(values))


# The blocks of one layer that lie in the cones of a batch of images.
# around: (N, C, m, m) the blocks of the corrupted images; image: (N,) the image that each block belongs to
# changed: positions in the flattened `around` of the variables that change, as they come from below
# goes_on: positions in a block that the next layer acts on; stays: the others, latents
Layer = namedtuple("Layer", ("bijector", "around", "changed", "image", "goes_on", "stays"))


class CausalCone:
    """The same for RG-Flow with the latents of the regions' inference cones free, by evaluating the cones alone.

    What lies outside the cones, its activations next to them and its part of log p, is computed here, once: `log_prob`
    touches no array of the image's size. Free latents are in the order level, decimator block, channel, position.
    """

    @torch.no_grad()
    def __init__(self, flow, x, regions):
        B, m = len(x), flow.kernel_size
        self.flow, self.x, self.layers, free = flow, x, [], []
        self.constant = x.new_zeros(B)  # log p of what no step changes
        places = torch.arange(x.numel(), device=x.device).reshape(x.shape)  # of the variables, in the flattened array
        changed = self.pixels = places[regions[:, None].expand_as(x)]
        cones = [inside for level in hierarchy.cone_blocks(regions, m) for inside in level]
        for (bijector, l, offset), inside in zip(flow.layers(), cones, strict=True):
            blocks, block_places = (hierarchy.to_blocks(array, m, offset) for array in (x, places))
            block_places = block_places[inside].flatten(2)
            ordered, order = block_places.flatten().sort()
            from_below = order[torch.searchsorted(ordered, changed.flatten())]
            goes_on = torch.full((m, m), offset > 0, device=x.device)
            goes_on[::2, ::2] |= l > m  # of a decimator; at the top nothing does
            goes_on, stays = (mask.flatten().nonzero()[:, 0] for mask in (goes_on, ~goes_on))
            image = inside.nonzero()[:, 0] // (l // m) ** 2
            self.layers.append(Layer(bijector, blocks[inside], from_below, image, goes_on, stays))
            free.append(block_places[:, :, stays].flatten())
            changed = block_places[:, :, goes_on]
            blocks, log_det = bijector(blocks)
            log_prior = flow.prior.log_prob(blocks.flatten(2)[:, :, stays]).sum((1, 2))
            for terms in (log_det, log_prior):
                self.constant += terms.masked_fill(inside, 0).reshape(B, -1).sum(1)
            x = hierarchy.from_blocks(blocks, l, offset)
            if offset == 0:
                x, places = x[:, :, ::2, ::2], places[:, :, ::2, ::2]
        self.num_blocks = sum(len(layer.image) for layer in self.layers)  # of one evaluation in each direction
        self.sizes, self.free = [len(latents) for latents in free], torch.cat(free)
        self.image = self.free // self.x[0].numel()

    def decode(self, values):
        """The corrupted pixels, in the order of `pixels`."""
        changed = values[:0]
        for layer, latents in zip(reversed(self.layers), reversed(values.split(self.sizes)), strict=True):
            blocks = layer.around.flatten(2)
            for places, part in ((layer.stays, latents), (layer.goes_on, changed)):
                if len(places):
                    blocks = blocks.index_copy(2, places, part.reshape(*blocks.shape[:2], -1))
            blocks, _ = layer.bijector.inverse(blocks.reshape(layer.around.shape))
            changed = blocks.flatten().index_select(0, layer.changed)
        return changed

    def paste(self, values):
        return self.x.flatten().index_copy(0, self.pixels, self.decode(values)).reshape(self.x.shape)

    def log_prob(self, values):
        changed, total = self.decode(values), self.constant
        for layer in self.layers:
            blocks = layer.around.flatten().index_copy(0, layer.changed, changed.flatten())
            blocks, log_det = layer.bijector(blocks.reshape(layer.around.shape))
            blocks, total = blocks.flatten(2), total.index_add(0, layer.image, log_det)
            if len(layer.stays):
                log_prior = self.flow.prior.log_prob(blocks.index_select(2, layer.stays)).sum((1, 2))
                total = total.index_add(0, layer.image, log_prior)
            changed = blocks.index_select(2, layer.goes_on)
        return total


def random_latents(counts, num_latents, generators):
    """Free latents for `WholeFlow`: per image, counts[b] different ones of `num_latents` drawn by generators[b]."""
    orders = (torch.randperm(num_latents, generator=generator) for generator in generators)
    chosen = zip(orders, counts, strict=True)
    return torch.cat([b * num_latents + order[:count] for b, (order, count) in enumerate(chosen)])


class Stop(Exception):
    """What `progress` raises to end `maximise` early."""


@torch.no_grad()
def maximise(problem, rate, steps, draws, generator=None, progress=lambda: None):
    """Maximise `problem.log_prob`, of a `WholeFlow` or `CausalCone`, over the free latents, for each image by itself.

    rate, steps: of Adam; draws: how many at temperature 1, the most likely is the start; progress: called after each
    Returns the best values met (F,), their log p (B,) and log p of the best draw (B,). Raises FloatingPointError if no
    draw has a finite log p.
    """
    best = problem.x.new_zeros(problem.free.shape)
    log_prob = start = best.new_full((len(problem.x),), -torch.inf)

    def keep_better(values, its_log_prob):
        nonlocal best, log_prob
        better = its_log_prob > log_prob
        best = torch.where(better[problem.image], values, best)
        log_prob = torch.where(better, its_log_prob, log_prob)

    evaluate = captured(problem.log_prob, best.device)
    with folded_together(problem.flow), suppress(Stop):
        for _ in range(draws):
            values = problem.flow.prior.sample(best, 1.0, generator)
            keep_better(values, evaluate(values))
            start = log_prob
            progress()
        if not log_prob.isfinite().all():
            raise FloatingPointError("log p of the draws to start from is not finite")
        values = best.clone()
        climb = climber(problem, values, rate)
        for _ in range(steps):
            keep_better(values.clone(), climb())
            progress()
        keep_better(values, evaluate(values))
        progress()
    return best, log_prob, start


def climber(problem, values, rate):
    """A function that moves `values` (F,) by a step of Adam towards larger log p and returns log p before it, (B,)."""
    adam = torch.optim.Adam([values], rate, maximize=True)

    @torch.enable_grad()
    def differentiate(values):
        values = values.detach().requires_grad_()
        log_prob = problem.log_prob(values)
        (gradient,) = torch.autograd.grad(log_prob.sum(), values)
        return torch.cat((log_prob.detach(), gradient))

    differentiate = captured(differentiate, values.device)

    def climb():
        log_prob, values.grad = differentiate(values).split((len(problem.x), len(values)))
        adam.step()
        return log_prob

    return climb


# images: (B, C, L, L) uint8; their PSNR (B,) in all and in the regions, dB; free latents (B,); log p (B,) of the start,
# of the result and of the image as it was
Inpainted = namedtuple("Inpainted", ("images", "psnr_image", "psnr_region", "free", "start", "log_prob", "truth"))


def inpaint(flow, images, regions, problem_of, rate, steps, draws, generator=None, progress=lambda: None):
    """Inpaint uint8 images (B, C, L, L) in their regions (B, L, L) bool, without regard to what is there: `Inpainted`.

    problem_of(x, regions): the `WholeFlow` or `CausalCone` to maximise; the other arguments: see `maximise`
    """
    x, _ = to_model(images, noise=0.5, dtype=next(flow.parameters()).dtype)
    problem = problem_of(x.masked_fill(regions[:, None], 0.0), regions)  # 0 is mid-grey
    values, log_prob, start = maximise(problem, rate, steps, draws, generator, progress)
    with torch.no_grad():
        pasted, truth = problem.paste(values), to_image(x)
        filled, pasted = torch.where(regions[:, None], to_uint8(pasted), images), to_image(pasted)
        quality = psnr(pasted, truth), psnr(pasted, truth, regions)
        free = problem.image.bincount(minlength=len(images))
        return Inpainted(filled, *quality, free, start, log_prob, flow.log_prob(x))


def natural_problem(flow, x, regions):
    """What to maximise: of RG-Flow the causal cone, of another flow all latents."""
    if flow.layers():
        return CausalCone(flow, x, regions)
    return WholeFlow(flow, x, regions, torch.arange(x.numel(), device=x.device))


def psnr(images, truth, regions=None):
    """Peak signal-to-noise ratio in dB of images (B, C, L, L) in [0, 1], peak 1, in regions (B, L, L) bool: (B,)."""
    squares = (images - truth).square().mean(1)
    regions = torch.ones_like(squares) if regions is None else regions
    return -10 * torch.log10((squares * regions).sum((1, 2)) / regions.sum((1, 2)))
