#!/usr/bin/env python3
"""Find the factors of MSDS1 or MSDS2 in the latents, level by level and position by position, with linear probes.

The probe of a level: R^2 on held-out images of a ridge regression of a factor (`data.msds.factors`) from its latents.
The ratio of the best single latent's R^2 to it is 1 if a factor has its own latents, low if it is spread over many.
Pixels can have a high ratio too: compare with an almost untrained flow. Seeds of one network are averaged.
"""

from itertools import cycle

import numpy as np
import torch

import args as flags
from data import msds
from flow.latents import encode
from utils import cli
from utils.plotting import COLOURS, PAGE, Figure, Line2D, Patch, save_figure, style
from utils.probes import Parts, position_r2, ridge_r2, single_r2
from utils.random import generator
from utils.results import about, by_network, mean_and_deviation, means, row, save, table

TITLES = {
    "msds1": ("global: base colour", "local: orientation of each oval", "each oval's colour minus the base"),
    "msds2": ("global: base orientation", "local: colour of each oval", "each oval's angle minus the base"),
}
FACTORS = "global", "local", "deviation"
WORDS = {"probe": "all latents of a level", "single": "its best single latent"}
FORMS = {"probe": {"marker": "o"}, "single": {"marker": "s", "linestyle": "--"}}
THIN = {"markersize": 3, "linewidth": 1}
BATCH = 250  # images
MIN_PROBE = 0.05  # R^2 of a probe below which the ratio says nothing


def probe_levels(flow, latents, factors):
    """A dict for each factor and level, from Parts of latents (N, C L L) and, by name, of factors (N, D), or (N, 16, D)
    for what each oval has; R^2 is the mean over ovals and the D numbers."""
    results, widths = [], [part.fit[0].numel() for part in factors.values()]
    labels = Parts(*(torch.cat([each.flatten(1) for each in part], 1) for part in zip(*factors.values(), strict=True)))
    for h in range(flow.num_levels):
        of_level = Parts(*(part[:, flow.level_map.flatten() == h] for part in latents))
        probes, singles = ridge_r2(of_level, labels).split(widths), single_r2(of_level, labels).split(widths)
        for name, probe, single in zip(factors, probes, singles, strict=True):
            result = {"factor": name, "level": h, "latents": of_level.fit.shape[1]}
            result |= {"probe": probe.mean().item(), "single": single.mean().item()}
            ratio = result["single"] / result["probe"] if result["probe"] >= MIN_PROBE else None
            results.append({**result, "ratio": ratio})
    return results


def probe_positions(flow, latents, factors):
    """R^2 from the C latents at each position alone, of the oval that is chosen for it: name -> (L, L)."""
    by_position = Parts(*(part.unflatten(1, (flow.nchannels, -1)).transpose(1, 2) for part in latents))
    maps = {}
    for name, parts in factors.items():
        chosen, scored = position_r2(by_position, Parts(*(part.flatten(1) for part in parts)))
        ovals = parts.fit.shape[1] if parts.fit.dim() == 3 else 1
        chosen, scored = (r2.unflatten(1, (ovals, -1)).mean(2) for r2 in (chosen, scored))
        best = chosen.argmax(1, keepdim=True)
        maps[name] = scored.gather(1, best).reshape(flow.L, flow.L).tolist()
    return maps


def probe(flow, dataset, variant, args, weights):
    """What `probe_levels` and `probe_positions` find in a flow. Raises UserError, naming `weights`, for its latents."""
    device, values = flow.level_map.device, {}
    for split, number in (("train", args.images), ("test", args.held_out)):
        images = torch.from_numpy(getattr(dataset, split)[:number])
        latents = encode(flow, images, generator(args.draw_seed, split, device=device), BATCH).flatten(1)
        if not latents.isfinite().all():
            raise cli.UserError(f"{weights}: its latents are not finite")
        labels = msds.factors(variant, *msds.read_labels(dataset.path, split, number))
        for name, each in {"latents": latents, **labels}.items():
            each = torch.as_tensor(each, device=device)
            values[name] = Parts(*values[name], *each.tensor_split(2)) if split == "test" else (each,)
    latents = values.pop("latents")
    return probe_levels(flow, latents, values), probe_positions(flow, latents, values)


def grouped(results):
    """(network, factor) -> level -> rows of `probe_levels`, a seed each."""
    groups = {}
    for result in results:
        for each in result["levels"]:
            groups.setdefault((result["network"], each["factor"]), {}).setdefault(each["level"], []).append(each)
    return groups


def rows(record):
    for first, results, data, flow, seeds in by_network(record["results"]):
        details = f"{seeds}, {record['images']:,} training and {record['held_out']:,} test images"
        for (_, factor), levels in grouped(results).items():
            cells = {f"h = {h}": means(own, probe=2, ratio=2) for h, own in levels.items()}
            yield row("factors", f"{data} {factor}, {flow}", cells, details, first)


def draw_figure(groups, results, titles):
    """R^2 by level, a panel per factor; below, a row per network (its first flow) of R^2 by position."""
    networks = list(dict.fromkeys(network for network, _ in groups))
    maps = {result["network"]: result["positions"] for result in reversed(results)}  # the first of each remains
    brightest = max(0.05, max(np.max(each) for positions in maps.values() for each in positions.values()))
    with style():
        figure = Figure(figsize=(PAGE, 2.3 + 2 * len(networks)), layout="constrained")
        top, *below = figure.subplots(1 + len(networks), len(titles))
        lines = {words: Line2D([], [], color="0.3", **FORMS[name], **THIN) for name, words in WORDS.items()}
        for axes, factor, title in zip(top, FACTORS, titles, strict=True):
            for network, colour in zip(networks, cycle(COLOURS)):
                levels, lines[network] = groups[network, factor], Patch(color=colour)
                for name, form in FORMS.items():
                    values = [mean_and_deviation([each[name] for each in seeds]) for seeds in levels.values()]
                    heights, deviations = zip(*values, strict=True)
                    bars = None if None in deviations else deviations
                    axes.errorbar(list(levels), heights, bars, color=colour, **form, **THIN)
            axes.axhline(0, color="0.6", linewidth=0.5, zorder=0)
            axes.set(title=title, xlabel="level h", ylim=(-0.05, 1.05), xticks=list(levels))
        top[0].set_ylabel("R² on held-out images")
        figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=2, frameon=False)
        for panels, network in zip(below, networks, strict=True):
            for axes, factor in zip(panels, FACTORS, strict=True):
                picture = axes.imshow(maps[network][factor], vmin=0, vmax=brightest, interpolation="nearest")
                ticks = range(0, len(maps[network][factor]), 8)
                axes.set(xticks=ticks, yticks=ticks, xlabel="column j")
            panels[0].set_ylabel(network.replace(" ", "\n", 1).replace(", ", "\n") + "\nrow i")
            figure.colorbar(picture, ax=list(panels), label="R², latents of one position")
    return figure


def main(argv=None):
    parser = flags.weights_parser(__doc__, pictures=True, numbers=True, images=True, several=True)
    add = parser.add_argument_group("probes").add_argument
    many = cli.number(int, 100, cli.LARGEST, f"a whole number of at least 100 and at most {cli.LARGEST}")
    add("--images", type=many, default=20_000, metavar="N", help="training images to fit the probes")
    add("--held_out", type=many, default=2000, metavar="N", help="test images: half choose the best latent, half score")
    args = flags.parse(parser, argv)
    record = {"kind": "factors", **about(__file__, argv, args.cuda)}  # at the start: the commit of the code that runs
    results, data, warnings = [], None, []
    for named, flow, config, trained in flags.load_flows(args, msds.VARIANTS):
        if data not in (None, config["data"]):
            raise cli.UserError(f"{trained['weights']}: trained on {config['data']}, the flows before it on {data}")
        data, (dataset, found) = config["data"], flags.open_data(config, args)
        warnings += [each for each in found if each not in warnings]
        for flag, split in (("images", dataset.train), ("held_out", dataset.test)):
            if getattr(args, flag) > len(split):
                raise cli.flag_error(f"--{flag}", getattr(args, flag), f"must be at most {len(split)} for {data}")
        levels, positions = probe(flow, dataset, msds.VARIANTS[data], args, trained["weights"])
        results.append({**named, **trained, "levels": levels, "positions": positions, "config": config})
    groups = grouped(results)
    print(f"{data}: {args.images} training and {args.held_out} test images; R^2, mean over seeds")
    for (network, factor), levels in groups.items():
        lines = [{"level": h, "latents": own[0]["latents"], "seeds": len(own)} for h, own in levels.items()]
        shown = [{name: means(own, **{name: 3}) for name in ("probe", "single", "ratio")} for own in levels.values()]
        print(f"{network}, {factor}", *table([line | more for line, more in zip(lines, shown, strict=True)]), sep="\n")
    record |= {"data": data, "images": args.images, "held_out": args.held_out, "warnings": warnings, "results": results}
    if args.json:
        save(args.json, record, rows)
    digests = [result["digest"] for result in results]
    save_figure(draw_figure(groups, results, TITLES[data]), cli.picture_path(args, "factors", data, key=digests))


if __name__ == "__main__":
    cli.script(main)
