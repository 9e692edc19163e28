"""Training batches on the training device, each a function of seed and step."""

import torch

from utils.cli import UserError
from utils.random import dequantisation_noise, generator


class Batches:
    """Batches of one split on `device`: uint8 images (B, C, L, L) and their dequantisation noise.

    images: numpy array, uint8 (N, C, L, L), kept on the device if it fits in a quarter of the free memory there
    flips: whether batches are mirrored left to right at random
    dtype: of the noise, the default type if None
    Raises UserError if there are fewer images than a batch holds.
    """

    def __init__(self, images, batch_size, device, seed, flips=False, dtype=None):
        if len(images) < batch_size:
            raise UserError(f"--batch_size {batch_size}: must be at most the {len(images)} training images")
        self.batch_size, self.seed, self.flips, self.dtype = batch_size, seed, flips, dtype
        self.device, self.images = torch.device(device), torch.from_numpy(images)
        if self.device.type == "cuda" and self.images.numel() < torch.cuda.mem_get_info(self.device)[0] / 4:
            self.images = self.images.to(self.device)
        self.steps_per_epoch = len(images) // batch_size  # the last partial batch is dropped: equal shapes
        self._epoch = None

    def __call__(self, step, rows=slice(None)):
        """Images and noise of training step `step` (from 0): those rows (a slice) of the batch. A row is the same
        whichever others are asked for, since flips and noise are drawn for the whole batch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._epoch != epoch:
            order = torch.randperm(len(self.images), generator=generator(self.seed, "order", epoch))
            self._epoch, self._order = epoch, order.to(self.images.device)
        order = self._order[position * self.batch_size : (position + 1) * self.batch_size]
        images = self.images[order[rows]]
        if images.device != self.device:
            images = images.pin_memory().to(self.device, non_blocking=True)
        step_generator = generator(self.seed, "step", step, self.device)
        if self.flips:
            flip = torch.rand(self.batch_size, 1, 1, 1, generator=step_generator, device=self.device) < 0.5
            images = torch.where(flip[rows], images.flip(3), images)
        shape = self.batch_size, *images.shape[1:]
        return images, dequantisation_noise(shape, self.device, step_generator, self.dtype)[rows]
