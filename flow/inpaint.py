"""Inpainting (sections 3.5 and 4.6, Appendix F): corrupted pixels from the rest of the image.

Everything is in model space. The latents z_g start at the encoding of the corrupted image, and some of them are free.
z_g is decoded, the region of what comes out is pasted into the corrupted image, and the free latents are moved until
the log-likelihood of the pasted image is largest. `WholeFlow` does that with any flow and any choice of free latents.

For RG-Flow the free latents are those of the region's inference cone. The region is decoded from them alone, and a
changed region alters nothing outside its cone, so `CausalCone` evaluates the blocks of the cone and no others: O(log L)
of them, where the whole flow has O(L^2). Since all latents that the region depends on are free, the result does not
depend on what was in the region.
"""

import torch

from . import hierarchy


class WholeFlow:
    """The likelihood of pasted images as a function of the free latents, by evaluating all of a flow.

    flow: any Flow in evaluation mode; its parameters should not ask for gradients
    x: (B, C, L, L) corrupted images; regions: (B, L, L) bool, their corrupted pixels
    free: (F,) the free latents, as positions in the flattened (B, C, L, L) array; `values` below are in this order
    image: (F,) the image that each free latent belongs to
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


class CausalCone:
    """The same for RG-Flow with the latents of the regions' inference cones free, by evaluating the cones alone.

    The activations of the corrupted images next to the cones, and what lies outside contributes to log p, are computed
    here, once. No evaluation of `log_prob` touches an array of the image's size. Arguments and attributes as in
    `WholeFlow`; the free latents are in the order level, decimator block, channel, position in the block.
    """

    @torch.no_grad()
    def __init__(self, flow, x, regions):
        B, m = len(x), flow.kernel_size
        self.flow, self.x, self.levels = flow, x, []
        self.constant = x.new_zeros(B)  # log p of what no step changes
        places = torch.arange(x.numel(), device=x.device).reshape(x.shape)  # of the variables, in the flattened array
        changed = self.pixels = places[regions[:, None].expand_as(x)]
        free = []
        for h, chosen in enumerate(hierarchy.cone_blocks(regions, m)):
            l, layers = flow.L >> h, []
            for bijector, offset, inside in zip(flow.level(h), (m // 2, 0), chosen, strict=True):
                blocks, block_places = (hierarchy.to_blocks(array, m, offset) for array in (x, places))
                block_places = block_places[inside]
                image = inside.nonzero()[:, 0] // (l // m) ** 2
                layers.append(BlocksOfCone(bijector, blocks[inside], positions(changed, block_places), image))
                blocks, log_det = bijector(blocks)
                self.constant += log_det.masked_fill(inside, 0).reshape(B, -1).sum(1)
                x, changed = hierarchy.from_blocks(blocks, l, offset), block_places
            goes_on = torch.zeros(m, m, dtype=torch.bool, device=x.device)
            goes_on[::2, ::2] = h < flow.num_levels - 1
            stays, goes_on = (mask.flatten().nonzero()[:, 0] for mask in (~goes_on, goes_on))
            self.levels.append((*layers, stays, goes_on))
            log_prior = flow.prior.log_prob(blocks).flatten(2)[:, :, stays].sum((1, 2))
            self.constant += log_prior.masked_fill(inside, 0).reshape(B, -1).sum(1)
            free.append(block_places.flatten(2)[:, :, stays].flatten())
            changed = block_places.flatten(2)[:, :, goes_on]
            x, places = x[:, :, ::2, ::2], places[:, :, ::2, ::2]
        self.sizes = [len(places) for places in free]
        self.free = torch.cat(free)
        self.image = self.free // self.x[0].numel()

    @property
    def num_blocks(self):
        """Blocks that one evaluation takes in each direction, for all images."""
        return sum(len(layer.image) for layers in self.levels for layer in layers[:2])

    def decode(self, values):
        """The corrupted pixels, in the order of `pixels`."""
        coarse = None
        for level, z in zip(reversed(self.levels), reversed(values.split(self.sizes)), strict=True):
            disentangler, decimator, stays, goes_on = level
            N, C, m, _ = decimator.around.shape
            blocks = values.new_zeros(N, C, m * m).index_copy(2, stays, z.reshape(N, C, -1))
            if coarse is not None:
                blocks = blocks.index_copy(2, goes_on, coarse.reshape(N, C, -1))
            coarse = disentangler.decode(decimator.decode(blocks))
        return coarse

    def paste(self, values):
        """The images (B, C, L, L), with what `values` (F,) of the free latents decode to in the regions."""
        return self.x.flatten().index_copy(0, self.pixels, self.decode(values)).reshape(self.x.shape)

    def log_prob(self, values):
        """log p of the pasted images, nats: (F,) -> (B,)."""
        changed, total = self.decode(values), self.constant
        for disentangler, decimator, stays, goes_on in self.levels:
            for layer in (disentangler, decimator):
                blocks, log_det = layer.encode(changed)
                total = total.index_add(0, layer.image, log_det)
                changed = blocks
            log_prior = self.flow.prior.log_prob(blocks.flatten(2).index_select(2, stays)).sum((1, 2))
            total = total.index_add(0, decimator.image, log_prior)
            changed = blocks.flatten(2).index_select(2, goes_on)
        return total


class BlocksOfCone:
    """The blocks of one layer that lie in the cones of a batch of images.

    bijector: of the layer
    around: (N, C, m, m) the blocks of the corrupted images
    changed: positions in the flattened `around` of the variables that change, as they come from below
    image: (N,) the image that each block belongs to
    """

    def __init__(self, bijector, around, changed, image):
        self.bijector, self.around, self.changed, self.image = bijector, around, changed, image

    def encode(self, values):
        """The variables that change -> the blocks above, (N, C, m, m), log_det (N,)."""
        blocks = self.around.flatten().index_copy(0, self.changed, values.flatten())
        return self.bijector(blocks.reshape(self.around.shape))

    def decode(self, blocks):
        """All variables of the blocks above -> the variables that change, flat."""
        return self.bijector.inverse(blocks.reshape(self.around.shape))[0].flatten().index_select(0, self.changed)


def positions(values, array):
    """Where in the flattened `array` of distinct whole numbers each entry of `values` is."""
    table = array.new_empty(int(array.max()) + 1)
    table[array.flatten()] = torch.arange(array.numel(), device=array.device)
    return table[values.flatten()]


def random_latents(counts, num_latents, generators):
    """Free latents for `WholeFlow`: per image, counts[b] different ones of `num_latents` drawn by generators[b]."""
    draws = [torch.randperm(num_latents, generator=generator) for generator in generators]
    return torch.cat(
        [b * num_latents + draw[:count] for b, (draw, count) in enumerate(zip(draws, counts, strict=True))]
    )


def maximise(problem, rate, steps, draws, generator=None, progress=None):
    """Maximise `problem.log_prob`, of a `WholeFlow` or `CausalCone`, over the free latents, for each image by itself.

    rate, steps: of Adam; draws: at temperature 1, of which the most likely is the start; progress: called after each of
    the draws and steps.
    Returns the best values met (F,), log p that they give (B,) and log p of the best draw (B,). Raises
    FloatingPointError if no draw has a finite log p.
    """
    best = problem.x.new_zeros(problem.free.shape)
    log_prob = best.new_full((len(problem.x),), -torch.inf)

    def keep_better(values, its_log_prob):
        nonlocal best, log_prob
        better = its_log_prob > log_prob
        best = torch.where(better[problem.image], values, best)
        log_prob = torch.where(better, its_log_prob, log_prob)
        if progress:
            progress()

    with torch.no_grad():
        for _ in range(draws):
            values = problem.flow.prior.sample(best, 1.0, generator)
            keep_better(values, problem.log_prob(values))
    if not log_prob.isfinite().all():
        raise FloatingPointError("log p of the draws to start from is not finite")
    start = log_prob
    values = best.clone().requires_grad_()
    adam = torch.optim.Adam([values], rate)
    for _ in range(steps):
        before = values.detach().clone()
        keep_better(before, climb(problem, values, adam))
    with torch.no_grad():
        keep_better(values, problem.log_prob(values))
    return best, log_prob, start


def climb(problem, values, adam):
    """One step of Adam towards larger log p; log p of the values before it, (B,)."""
    adam.zero_grad()
    log_prob = problem.log_prob(values)
    (-log_prob.sum()).backward()
    adam.step()
    return log_prob.detach()


def psnr(images, truth, regions=None):
    """Peak signal-to-noise ratio in dB of images (B, C, L, L) in [0, 1], peak 1: (B,).

    regions: (B, L, L) bool, count these pixels alone
    """
    squares = (images - truth).square().mean(1)
    if regions is None:
        regions = torch.ones_like(squares)
    return -10 * torch.log10((squares * regions).sum((1, 2)) / regions.sum((1, 2)))
