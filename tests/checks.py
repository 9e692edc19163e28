"""What every bijector must pass, against autograd's Jacobian."""

import torch

from flow import RealNVP, RGFlow


def randomise(module, scale=0.5):
    """Move every parameter, so that nothing is the identity; gradients are asked for inputs only."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module.eval().requires_grad_(False)


def jacobian(function, x):
    """Autograd's Jacobian of function: (1, …) -> (1, …) as a matrix (outputs, inputs)."""

    def flat(values):
        return function(values.reshape(x.shape)).flatten()

    return torch.func.jacrev(flat, chunk_size=256)(x.flatten())


def check_bijector(bijector, x):
    """Shapes, round trip and both log-determinants of a bijector at x (B, …), the Jacobian at its first entry."""
    y, log_det = bijector(x)
    back, log_det_back = bijector.inverse(y)
    assert y.shape == back.shape == x.shape
    assert log_det.shape == log_det_back.shape == x.shape[:1]
    assert (y - x).abs().max() > 0.1, "the bijector under test is nearly the identity"
    assert (back - x).abs().max() < 1e-9
    for function, at, claimed in ((bijector, x, log_det), (bijector.inverse, y, log_det_back)):
        matrix = jacobian(lambda value, function=function: function(value)[0], at[:1])
        torch.testing.assert_close(claimed[0], torch.linalg.slogdet(matrix).logabsdet, rtol=1e-9, atol=1e-9)


def levels(flow):
    """The level of each latent position (L, L), by the definitions: zeros at the end of the binary i | j, or i xor j
    for Real NVP."""
    i, j = torch.meshgrid(torch.arange(flow.L), torch.arange(flow.L), indexing="ij")
    bits = i ^ j if isinstance(flow, RealNVP) else i | j
    return sum((bits % 2 ** (h + 1) == 0).int() for h in range(flow.num_levels - 1))


def small(model=RGFlow, **settings):
    """16 x 16 images: three levels."""
    sizes = {"nchannels": 3, "L": 16, "nlayers": 1, "nresblocks": 1, "nmlp": 1, "nhidden": 6, **settings}
    return randomise(model(**sizes), 0.2)


def bytes_of(images):
    """Images in [0, 1] -> uint8 with 256 equal bins."""
    return (images * 256).floor().clamp(0, 255).to(torch.uint8)


def random_images(n):
    return torch.randint(256, (n, 3, 16, 16), dtype=torch.uint8)
