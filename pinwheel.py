#!/usr/bin/env python3
"""Train two-dimensional flows with both priors on a pinwheel (Appendix E, figure E1): do quadrants go to legs?

Sectors are the quadrants, as in the paper, and turned quadrants, because a flow need not map quadrants to legs.
"""

import math
from itertools import permutations

import torch
from torch import nn
from tqdm import trange

from flow.prior import PRIORS
from layers.coupling import couple, uncouple
from layers.residual import ResidualNetworks
from utils import cli
from utils.plotting import COLOURS, PAGE, Figure, save_figure, style
from utils.random import derived_seed, generator
from utils.results import PRIOR_NAMES, about, entries, means, row, save

LEGS, RADIAL_STD, TANGENTIAL_STD, RATE = 4, 0.3, 0.1, 0.25
BATCH, LR, CLIP, NLAYERS, NHIDDEN = 512, 1e-2, 1.0, 4, 32
COLUMNS = {"quadrants": "quadrants", "axes": "sectors about the axes", "best": "best of all turned quadrants"}
TURNS = range(0, 90, 5)  # degrees


class PlanarFlow(nn.Module):
    """RNVP blocks on points of the plane; forward: x (N, 2) -> z (N, 2), log_det (N,); inverse: z -> x."""

    def __init__(self, prior, nlayers=NLAYERS, nhidden=NHIDDEN):
        super().__init__()
        self.prior = PRIORS[prior]()
        self.networks = ResidualNetworks(2 * nlayers, 2, 1, nhidden, nresblocks=1, nmlp=2)

    def forward(self, x):
        (kept, moved), log_scale = x.split(1, 1), 0
        for folded in self.networks.steps():
            (kept, s), moved = couple(folded, kept, moved), kept
            log_scale = log_scale + s
        return torch.cat((kept, moved), 1), log_scale.sum(1)

    def inverse(self, z):
        kept, moved = z.split(1, 1)
        for folded in reversed(self.networks.steps()):
            kept, (moved, _) = moved, uncouple(folded, moved, kept)
        return torch.cat((kept, moved), 1)

    def log_prob(self, x):
        z, log_det = self(x)
        return self.prior.log_prob(z).sum(1) + log_det

    @torch.no_grad()
    def draw(self, n, generator):
        """n latents from the prior and their images, (n, 2) each."""
        z = self.prior.sample(torch.empty(n, 2), generator=generator)
        return z, self.inverse(z)


def turn(points, leg, radius):
    """Points (…, 2) on the leg at angle 0, turned by leg * 90 degrees + RATE exp(radius) radians."""
    angle = leg * 2 * math.pi / LEGS + RATE * radius.exp()
    u, v = points.unbind(-1)
    return torch.stack((u * angle.cos() - v * angle.sin(), u * angle.sin() + v * angle.cos()), -1)


def pinwheel(n, generator):
    """n points of the pinwheel (n, 2) and the leg of each (n,)."""
    leg = torch.randint(LEGS, (n,), generator=generator)
    points = torch.randn(n, 2, generator=generator) * torch.tensor([RADIAL_STD, TANGENTIAL_STD])
    points[:, 0] += 1
    return turn(points, leg, points[:, 0]), leg


def nearest_arm(x):
    """The arm, 0 … 3, whose line (the leg without its width) passes nearest to each point: (N, 2) -> (N,)."""
    radius = torch.arange(0, 2.5, 0.01)
    line = torch.stack((radius, torch.zeros_like(radius)), -1)
    arms = turn(line, torch.arange(LEGS)[:, None], radius)  # (LEGS, 250, 2)
    return torch.cdist(x, arms.flatten(0, 1)).argmin(1) // len(radius)


def sector(z, degrees=0):
    """The quadrant of each point (N, 2) -> (N,), in axes turned by `degrees` anticlockwise."""
    angle = torch.atan2(z[:, 1], z[:, 0]) - math.radians(degrees)
    return (angle.remainder(2 * math.pi) * LEGS / (2 * math.pi)).long().clamp(max=LEGS - 1)


def matched_accuracy(sectors, arms):
    """The share of points in the arm of their sector, under the best one-to-one matching."""
    counts = torch.bincount(LEGS * sectors + arms, minlength=LEGS**2).reshape(LEGS, LEGS).tolist()
    return max(sum(map(list.__getitem__, counts, match)) for match in permutations(range(LEGS))) / len(sectors)


def train(prior, seed, steps):
    """A flow trained on fresh points with AdamW, its rate falling to 0 along a cosine."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "weights"))
        flow = PlanarFlow(prior)
    points = generator(seed, "pinwheel")
    optimizer = torch.optim.AdamW(flow.parameters(), LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in trange(steps, desc=f"{prior} {seed}", unit="step", leave=False, disable=None):
        loss = -flow.log_prob(pinwheel(BATCH, points)[0]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), CLIP)
        optimizer.step()
        schedule.step()
    return flow.eval()


def measure(flow, n, seed):
    """Of n draws: accuracy of quadrants, of sectors about the axes (turned by 45 degrees), and of the best sectors."""
    z, x = flow.draw(n, generator(seed, "accuracy"))
    arms = nearest_arm(x)
    accuracy = {degrees: matched_accuracy(sector(z, degrees), arms) for degrees in TURNS}
    best = max(accuracy, key=accuracy.get)
    with torch.no_grad():
        nats = -flow.log_prob(pinwheel(n, generator(seed, "test"))[0]).mean().item()
    return {"nats": nats, "quadrants": accuracy[0], "axes": accuracy[45], "best": accuracy[best], "best_degrees": best}


def rows(record):
    for prior in dict.fromkeys(each["prior"] for each in record["results"]):
        own = [each for each in record["results"] if each["prior"] == prior]
        cells = {column: means(own, **{key: 3}) for key, column in COLUMNS.items()}
        yield row("pinwheel", PRIOR_NAMES[prior], cells, f"{len(own)} seeds, {record['config']['steps']:,} steps each")


def draw_figure(flows, seed):
    """Figure E1, a row per prior: its density, 100 draws coloured by quadrant, their images, the pinwheel."""
    grid = torch.linspace(-4, 4, 201)
    mesh = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1)
    target, _ = pinwheel(2000, generator(seed, "figure pinwheel"))
    with style():
        figure = Figure(figsize=(PAGE, 3.6), layout="constrained")
        rows = figure.subplots(len(flows), 4)
        for row, (prior, flow) in zip(rows, flows.items(), strict=True):
            z, x = flow.draw(100, generator(seed, "figure"))
            colours = [COLOURS[k] for k in sector(z)]
            row[0].contourf(grid, grid, flow.prior.log_prob(mesh).sum(-1).exp(), 12, cmap="Blues")
            row[0].set_ylabel(f"{prior.capitalize()} prior")
            row[1].scatter(*z.T, s=8, c=colours, linewidths=0)
            row[2].scatter(*x.T, s=8, c=colours, linewidths=0)
            row[3].scatter(*target.T, s=1, c="0.5", linewidths=0, rasterized=True)
            for draw_axis in (row[1].axhline, row[1].axvline):
                draw_axis(0, color="0.6", linewidth=0.5, zorder=0)
            for axes, limit in zip(row, (4, 4, 2.2, 2.2), strict=True):
                edges, ticks = (-limit, limit), (-2, 0, 2)
                axes.set(xlim=edges, ylim=edges, aspect="equal", xticks=ticks, yticks=ticks)
        for axes, title in zip(rows[0], ("prior", "draws, by quadrant", "their images", "pinwheel"), strict=True):
            axes.set_title(title)
    return figure


def main(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--fig_dir", default="./figures", metavar="DIR", help="folder for the picture, PNG and PDF")
    add("--json", metavar="FILE", help="write the results there")
    add("--draw_seed", type=cli.count, default=0, metavar="N", help="seed of all draws")
    add("--seed", type=cli.count, default=0, metavar="N", help="first seed of weights and points")
    add("--seeds", type=cli.positive, default=5, metavar="N", help="flows per prior")
    add("--steps", type=cli.positive, default=3000, metavar="N", help=f"training steps of {BATCH} points")
    add("--points", type=cli.positive, default=10_000, metavar="N", help="draws that the accuracy is measured on")
    args = parser.parse_args(argv)
    cli.check_output(parser, args)
    origin = about(__file__, argv, "cpu")  # at the start: the commit of the code that runs
    results, shown = [], {}
    for prior in PRIOR_NAMES:
        for seed in range(args.seed, args.seed + args.seeds):
            flow = train(prior, seed, args.steps)
            shown.setdefault(prior, flow)
            results.append({"prior": prior, "seed": seed, **measure(flow, args.points, args.draw_seed)})
            print(*(f"{name} {text}" for name, text in entries(results[-1])), sep=", ", flush=True)
        words = ", ".join(f"{key} {means(results[-args.seeds :], **{key: 3})}" for key in ("nats", *COLUMNS))
        print(f"{prior:8} mean of {args.seeds}: {words}")
    x, legs = pinwheel(args.points, generator(args.draw_seed, "test"))
    ceiling = (nearest_arm(x) == legs).double().mean().item()
    print(f"the pinwheel itself: {ceiling:.3f} of its points are nearest to their own arm; chance is 0.25")
    if args.json:
        config = {key: getattr(args, key) for key in ("seed", "seeds", "steps", "points", "draw_seed")}
        config |= {"batch": BATCH, "lr": LR, "nlayers": NLAYERS, "nhidden": NHIDDEN}
        record = {"kind": "pinwheel", **origin, "config": config, "ceiling": ceiling, "results": results}
        save(args.json, record, rows)
    save_figure(draw_figure(shown, args.draw_seed), cli.picture_path(args, "pinwheel"))


if __name__ == "__main__":
    cli.script(main)
