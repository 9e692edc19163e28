"""What one tab of the browser explores: a flow, a picture as latents, edits of them, and how each is drawn. No page."""

import shlex
import tempfile
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from flow.hierarchy import generation_cone, inference_cone
from flow.inpaint import Stop, inpaint, natural_problem
from flow.latents import Decoder, decode, edited, energies, from_levels, latents_of, round_trip_error
from flow.preprocess import to_bytes
from utils.cache import digest
from utils.cli import MIXED, UserError, file_name, listing
from utils.plotting import SCREEN, field_pictures, grid_figure, png, save_animation, write
from utils.random import generator

PER_LEVEL = 4  # latents of each level in a list
HIGHEST = 1.5  # temperature
RANGE = 6.0  # of a latent's slider, both ways
FRAMES, SECONDS, SLOWLY = 16, 0.1, 0.5  # of a walk: frames, and how long each is seen
STEPS, DRAWS, RATE = 100, 50, 0.1  # of inpainting; a few seconds
RESULT = "{}: PSNR {:.1f} dB of the image, {:.1f} dB in the region; {} free latents; log p = {:,.0f} nats of the best"
RESULT += " draw, {:,.0f} of the result, {:,.0f} of the picture before"
# What a picture depends on and is said of it: what comes back with the picture before inpainting.
EDITED = "a", "b", "temperature", "swap", "theta", "high", "values", "result", "before"
QUICK = 10**7  # parameters of a flow whose receptive fields are computed before they are asked for


@dataclass(frozen=True)
class Source:
    """Where a picture comes from."""

    kind: str  # sample, test, file
    name: object  # seed, number, name of the file
    z: torch.Tensor  # (C, L, L)
    image: torch.Tensor | None = None  # (C, L, L), uint8, None for a sample
    files: dict = field(default_factory=dict)  # name -> PNG, what the command reads
    temperature: tuple = ()  # of a sample
    error: float | None = None  # of an image that is encoded and decoded, of 256 levels

    @property
    def argument(self):
        """As `plot_reconstruct.py` takes it."""
        return str(self.name) if self.kind == "file" else f"{self.kind}:{self.name}"

    @property
    def words(self):
        if self.kind == "sample":
            return f"sample of seed {self.name} at T = {listing(self.temperature)} (h = 0 first)"
        return f"{'test image' if self.kind == 'test' else self.kind} {self.name}"


class Tab:
    """State of a tab. What changes it, but for `inpaint` and `stop`, is called within `changing`.

    library: what tabs have in common, see `explore.Library`
    """

    def __init__(self, library):
        self.library, self.known, self.folder = library, dict(library.known), Path(tempfile.mkdtemp(dir=library.folder))
        self.lock, self.inpainting, self.stopped, self.saved = threading.Lock(), threading.Lock(), False, {}
        self.a, self.b, self.config, self.temperature = None, None, None, ()
        self.shown, self.newest = {}, 0  # by each component of the page; number of the picture's newest event
        self.open_weights(next(iter(self.known)))

    @contextmanager
    def changing(self):
        """For one thread at a time; after an error, all is as it was."""
        with self.lock:
            before = dict(vars(self))
            try:
                yield
            except Exception:
                vars(self).update(before)
                raise

    # What is explored

    def add_weights(self, path):
        """Another file of weights, an upload."""
        self.known = {**self.known, Path(path).name: path}
        self.open_weights(Path(path).name)

    def open_weights(self, name):
        """Another flow, for the same pictures if it can take them, otherwise for samples. Raises UserError for a file
        that is no checkpoint."""
        path = self.known[name]
        flow, config, trained = self.library.load(path)
        before, self.weights, self.flow, self.config, self.trained = self.config, name, flow, config, trained
        self.file = self.library.named(path)
        self.decoder = Decoder(flow)
        if len(self.temperature) != flow.num_levels:
            self.temperature = MIXED[0], *MIXED[1:] * (flow.num_levels - 1)
        self.latents, self.latent, self.pixel, self.region = [], None, None, None
        if trained["parameters"] <= QUICK:
            self.library.prepare_fields(path)
        for which, seed in (("a", 0), ("b", 1)):
            source = getattr(self, which)
            if source and source.image is not None and source.image.shape == flow.level_map.shape:
                if source.kind == "test" and before["data"] != config["data"]:  # which has others of these numbers
                    own = f"{before['data']}_test_{source.name}.png"
                    source = replace(source, kind="file", name=own, files={own: png(source.image)})
                setattr(self, which, self.encoded(source.kind, source.name, source.image, source.files))
            else:
                seed = source.name if source and source.kind == "sample" else seed
                setattr(self, which, self.sample(seed, self.temperature))
        self.unedit()

    def sample(self, seed, temperature):
        source = "sample", seed
        return Source(*source, latents_of(self.flow, source, None, temperature), temperature=temperature)

    def encoded(self, kind, name, image, files=()):
        z, error = latents_of(self.flow, (kind, name), image), round_trip_error(self.flow, image[None])
        return Source(kind, name, z, image, dict(files), error=error)

    def open_sample(self, which, seed):
        """The sample of a seed; None, an empty field, for what is there."""
        if seed is not None:
            self.put(which, self.sample(whole("seed", seed), self.temperature))

    def open_next(self, which):
        """The sample of the next seed."""
        source = getattr(self, which)
        self.open_sample(which, source.name + 1 if source.kind == "sample" else 0)

    def open_test(self, which, number):
        number = whole("test image", number)
        self.put(which, self.encoded("test", number, self.library.test_image(self.config, number)))

    def open_file(self, which, path):
        image = self.library.image(self.config, path)
        name = f"{file_name(Path(path).stem)}_{digest(image)[:6]}.png"
        self.put(which, self.encoded("file", name, image, {name: png(image)}))

    def put(self, which, source):
        """A picture as the first, "a", or the second, "b"."""
        setattr(self, which, source)
        if which == "a":
            self.unedit()
        else:
            self.draw()

    def unedit(self):
        """Forget all edits."""
        self.swap, self.theta, self.high, self.values, self.result, self.walk = (), 0, True, {}, "", None
        self.before = None
        self.draw()

    def set_temperature(self, h, temperature):
        """Of level h, for samples."""
        before = self.temperature

        def at(value):
            own = (*before[:h], value, *before[h + 1 :])
            return own, *(s if s.image is not None else self.sample(s.name, own) for s in (self.a, self.b))

        self.temperature, self.a, self.b = at(temperature)
        self.walk = f"T of h = {h}", spread(0, HIGHEST), lambda value: self.z(*at(value)[1:]), SECONDS
        self.draw()

    # Latents

    def fields(self):
        return self.library.fields(self.known[self.weights])

    def list_latents(self, pixel=None):
        """Find `latents`, the strongest of each level, from the top, at a pixel (row, column) or over all of them."""
        fields, self.latents = self.fields(), []
        strengths = fields.strengths if pixel is None else fields.fields[:, pixel[0], pixel[1]]
        for h in reversed(range(self.flow.num_levels)):
            own = fields.of_level(h)
            best = own[strengths[own].argsort(descending=True, stable=True)[:PER_LEVEL]]
            self.latents += [(fields.name(k), strengths[k].item()) for k in best if strengths[k] > 0]
        self.pixel = pixel and tuple(pixel)

    def pick(self, name):
        """Choose a latent, level:row:column:channel."""
        _, i, j, c = (int(part) for part in name.split(":"))
        self.latent = c, i, j

    @property
    def name(self):
        """Of the chosen latent, None without."""
        return self.latent and self.name_of(self.latent)

    def name_of(self, latent):
        c, i, j = latent
        return f"{self.flow.level_map[c, i, j]}:{i}:{j}:{c}"

    def value(self):
        """Of the chosen latent."""
        return self.z()[self.latent].item() if self.latent else 0.0

    def range(self):
        """Of the slider of its value."""
        edge = max(RANGE, float(np.ceil(abs(self.value()))))
        return -edge, edge

    def set_latent(self, value=None):
        """Of the chosen latent; None for its own value again."""
        if self.latent is None:
            raise UserError("no latent is chosen: click a pixel of the picture, then choose one of the list")
        latent, others = self.latent, {each: own for each, own in self.values.items() if each != self.latent}
        self.values = others if value is None else {**others, latent: float(value)}
        values = spread(*self.range())
        self.walk = f"latent {self.name}", values, lambda own: self.z(values={**others, latent: own}), SECONDS
        self.draw()

    def cone(self, latents=None):
        """The pixels that latents, by default the chosen one, can affect: (L, L) bool; None if that is unknown."""
        latents = [self.latent] * bool(self.latent) if latents is None else latents
        if not latents or not self.flow.layers():
            return None
        L, m = self.flow.L, self.flow.kernel_size
        return torch.stack([generation_cone(i, j, L, m) for _, i, j in latents]).any(0)

    # Mixing

    def choose_levels(self, swap):
        """The levels that the second picture gives."""
        self.swap, self.walk = tuple(sorted(int(h) for h in swap)), None
        self.draw()

    def set_theta(self, theta, first_is_high):
        """Equation 15: the first picture, or the second, gives the levels h >= theta, the other those below."""

        def given(theta):
            return tuple(h for h in range(self.flow.num_levels) if (h < theta) == first_is_high)

        values = range(self.flow.num_levels + 1)
        self.theta, self.high = theta, first_is_high
        self.choose_levels(given(theta))
        self.walk = "Θ", values, lambda value: self.z(swap=given(value)), SLOWLY

    # Regions

    def select(self, region):
        """A rectangle: row, column, height, width."""
        self.region = tuple(region)

    def counts(self):
        """How many latents of each level are in the inference cone of the rectangle: (level, number, of how many); None
        for a flow without blocks."""
        if not self.flow.layers():
            return None
        levels, channels = self.flow.level_map[0].cpu(), self.flow.nchannels
        cone, own = inference_cone(self.mask(), self.flow.kernel_size), range(self.flow.num_levels)
        numbers = [[channels * int(each.sum()) for each in (cone & (levels == h), levels == h)] for h in own]
        return [(h, *pair) for h, pair in enumerate(numbers)]

    def mask(self):
        mask = torch.zeros(self.flow.L, self.flow.L, dtype=torch.bool)
        row, column, height, width = self.region
        mask[row : row + height, column : column + width] = True
        return mask

    def inpaint(self, steps, draws, progress):
        """Inpaint the rectangle of what the tab shows now, which takes seconds; the result becomes the first picture.
        progress(done, total): called after each step"""
        steps, draws = whole("steps", steps), whole("draws", draws, 1)
        if self.region is None:
            raise UserError("no region is chosen: drag a rectangle on the picture")
        with self.changing():
            self.stopped, flow, picture, mask = False, self.flow, self.picture, self.mask()
            files, before, region = self.files(), self.picture_name(), self.region
        done, total = 0, draws + steps + 1

        def advance():
            nonlocal done
            done += 1
            progress(done, total)
            if self.stopped or not torch.equal(picture, self.picture):
                raise Stop

        device = flow.level_map.device
        given = picture[None].to(device), mask[None].to(device), partial(natural_problem, flow), RATE, steps, draws
        with self.inpainting:
            result = inpaint(flow, *given, generator(0, "inpaint", before, device), advance)
        made = {"steps": max(done - draws - 1, 0), "draws": min(done, draws)}  # they give the same if it was stopped
        command = self.command("inpaint.py", files=before, region=listing(region), rate=RATE, **made)
        image = result.images[0].cpu()
        after = f"inpainted_{digest(image)[:6]}.png"
        files[after] = png(image, Command=command)
        with self.changing():
            if flow is not self.flow or not torch.equal(picture, self.picture):
                raise UserError("the picture was changed meanwhile: inpainting has ended")
            kept = {name: vars(self)[name] for name in EDITED}
            self.put("a", self.encoded("file", after, image, files))
            self.before = kept
            words = "Inpainted" if done == total else "Stopped, the best so far"
            self.result = RESULT.format(words, *(each.item() for each in result[1:]))

    def stop(self):
        self.stopped = True

    def undo(self):
        """The picture before it was inpainted, with its edits."""
        if self.before is None:
            raise UserError("this picture was not inpainted: no picture before")
        vars(self).update(self.before)
        self.walk = None
        self.draw()

    # What is shown

    def z(self, a=None, b=None, swap=None, values=None):
        """The latents (C, L, L) of the picture, or of what it would be with other sources or edits."""
        swap, values = self.swap if swap is None else swap, self.values if values is None else values
        return edited(self.flow, (a or self.a).z[None], (b or self.b).z[None], swap, (), values.items())[0]

    def draw(self):
        """Decode what has changed: uint8 images (C, L, L), `levels` of the levels >= h alone, a list, the picture with
        `unchanged` latents, and the `second` picture."""
        unchanged = self.z(values={}) if self.values else torch.zeros_like(self.b.z)  # 0 costs nothing after the first
        others = torch.stack((unchanged, self.b.z))
        images = self.decoder(torch.cat((from_levels(self.flow, self.z()), others)))
        if not images.isfinite().all():
            raise FloatingPointError("the picture is not finite and not shown: a latent is too far out")
        *self.levels, unchanged, self.second = to_bytes(images)
        self.unchanged = unchanged if self.values else self.picture

    @property
    def picture(self):
        return self.levels[0]

    def describe(self):
        """Sentences on the picture."""
        words = [f"{self.a.words[0].upper()}{self.a.words[1:]}"]
        if self.a.error is not None:
            words[0] += f" (encoded and decoded: largest error {self.a.error:.1g} of 256)"
        if self.swap:
            words[0] += f", levels h = {listing(self.swap)} of {self.b.words}"
        if self.values:
            differ, cone = (self.picture != self.unchanged).any(0), self.cone(self.values)
            changed = f"{len(self.values)} latent{'s' * (len(self.values) > 1)} changed"
            words.append(f"{changed}: {int(differ.sum()):,} of {differ.numel():,} pixels differ")
            words[-1] += "" if cone is None else f", {int((differ & ~cone).sum())} of them outside the generation cone"
        return ". ".join([*words, *[self.result] * bool(self.result)])

    def energies(self):
        return energies(self.flow, self.z()[None])

    def field(self):
        """The receptive field of the chosen latent over the picture, (3, L, L) uint8, None without a latent."""
        if self.latent is None:
            return None
        fields = self.fields()
        at = (fields.latents == torch.tensor(self.latent)).all(1).nonzero()
        share = fields.fields[at[0, 0]] / fields.fields[at[0, 0]].max().clamp_min(1e-30)
        grey = self.picture.double().mean(0).expand(3, -1, -1) / 255
        colours = torch.from_numpy(field_pictures(fields.fields[at[0]])[0])
        return to_bytes(grey * (1 - share) + colours * share)

    def magnitudes(self):
        """|z| of each level, root mean square over the channels, a square (l, l) each, NaN where variables go on."""
        size, levels = self.z().square().mean(0).sqrt().cpu(), self.flow.level_map[0].cpu()
        size = [torch.where(levels == h, size, torch.nan) for h in range(self.flow.num_levels)]
        return [each[:: 2**h, :: 2**h] if self.flow.layers() else each for h, each in enumerate(size)]

    # What is saved

    def command(self, script, **flags):
        """A command line with flags."""
        given = [shlex.quote(f"--{name}={value}") for name, value in flags.items()]
        return " ".join(["python", script, "--weights", shlex.quote(self.file), *self.library.flags, *given])

    def picture_command(self):
        """The command that makes the picture again."""
        flags, sources = {"file": self.a.argument}, [self.a]
        if self.swap:
            flags |= {"other": self.b.argument, "swap": listing(self.swap)}
            sources.append(self.b)
        if self.values:
            flags["set"] = ",".join(f"{self.name_of(latent)}={value!r}" for latent, value in self.values.items())
        if any(source.kind == "test" for source in sources):
            flags |= self.library.data_flags
        if any(source.kind == "sample" for source in sources):
            flags["temperature"] = ",".join(map(repr, self.temperature))
        return self.command("plot_reconstruct.py", **flags)

    def picture_name(self):
        if self.a.kind == "file" and torch.equal(self.picture, self.a.image):
            return self.a.name
        return f"{Path(self.file).stem}_{digest(self.picture)[:6]}.png"

    def files(self):
        """The picture, and the files that its command reads: name -> PNG."""
        own = {self.picture_name(): png(self.picture, Command=self.picture_command())}
        return own | (self.b.files if self.swap else {}) | self.a.files

    def save_picture(self):
        for name, content in self.files().items():
            self.save(name, lambda file, content=content: file.write(content))

    def save_latents(self):
        """z, (C, L, L), and how it came about."""
        saved = {"z": self.z().cpu(), "weights": self.file, "digest": self.trained["digest"]}
        saved["command"] = self.picture_command()
        self.save(str(Path(self.picture_name()).with_suffix(".pt")), partial(torch.save, saved))

    def save_walk(self):
        """What the slider that was moved last does, from one end to the other and back."""
        if self.walk is None:
            raise UserError("no slider was moved: move that of a temperature, of a latent or of Θ first")
        name, values, at, seconds = self.walk
        images = decode(self.flow, torch.stack([at(value) for value in values]))[:, None]
        figures = [
            grid_figure(image, 1, SCREEN, columns=[f"{name} = {value:.4g}"])
            for image, value in zip(images, values, strict=True)
        ]
        path = self.folder / Path(self.picture_name()).stem
        save_animation([*figures, *figures[-2:0:-1]], path, seconds, quiet=True)
        self.saved = {**self.saved, f"{path.name}.gif": Path(f"{path}.gif")}

    def save(self, name, save):
        """Write a file by save(file), one of `saved`."""
        self.saved = {**self.saved, name: write(self.folder / name, save, quiet=True)}


def spread(low, high):
    return torch.linspace(low, high, FRAMES).tolist()


def whole(name, value, least=0):
    """A number of the page as an int. Raises UserError if it is none from `least` on."""
    if value is None or not least <= value < 2**31 or value != int(value):
        given = "missing" if value is None else value
        raise UserError(f"{name} {given}: must be a whole number from {least} to {2**31 - 1}")
    return int(value)
