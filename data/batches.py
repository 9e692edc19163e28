"""Training and test batches on the training device, each a function of seed, epoch and step."""

import torch

from utils.random import generator


class Batches:
    """uint8 batches (B, C, L, L) of one split, on `device`.

    The split lies on the device if it fits in a quarter of the memory that is free there, else in host memory.

    images: numpy array, uint8 (N, C, L, L)
    flips: whether training batches are mirrored left to right at random
    Raises ValueError if there are fewer images than a batch holds.
    """

    def __init__(self, images, batch_size, device, seed, flips=False):
        if len(images) < batch_size:
            raise ValueError(f"batch_size {batch_size}: must be at most the {len(images)} training images")
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.seed = seed
        self.flips = flips
        self.images = torch.from_numpy(images)
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if self.images.numel() < free / 4:
                self.images = self.images.to(self.device)
        self.steps_per_epoch = len(images) // batch_size  # the last partial batch is dropped: equal shapes
        self._epoch = None

    def train(self, step, noise, rows=slice(None)):
        """The rows (a slice) of the batch of training step `step` (from 0).

        noise: the step's generator on the device, from which the whole batch is drawn, whichever rows are wanted
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._epoch != epoch:
            order = torch.randperm(len(self.images), generator=generator(self.seed, "order", epoch))
            self._epoch, self._order = epoch, order.to(self.images.device)
        order = self._order[position * self.batch_size : (position + 1) * self.batch_size]
        batch = self.images[order[rows]]
        if batch.device != self.device:
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        if self.flips:
            flip = torch.rand(self.batch_size, 1, 1, 1, generator=noise, device=self.device) < 0.5
            batch = torch.where(flip[rows], batch.flip(3), batch)
        return batch
