"""The page, made with Gradio: its controls, what each does to the `Tab` of a browser's tab, and what all show then."""

import base64
from functools import partial
from html import escape
from pathlib import Path

import gradio as gr
import numpy as np
import torch

from flow.fields import SUBSET
from utils.cli import UserError
from utils.plotting import field_pictures, png

from .tab import DRAWS, HIGHEST, RANGE, STEPS, Tab

HERE = Path(__file__).parent
CSS, JS = ((HERE / name).read_text("utf-8") for name in ("page.css", "picture.js"))
MOST_LEVELS = 8  # with a slider of the temperature
EVENT = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
DRAG = {**EVENT, "trigger_mode": "always_last"}
Slider = partial(gr.Slider, buttons=[])  # without Gradio's button, which moves it but calls no function
# A number typed beyond the ends of a slider counts as its end, where the browser then puts the slider.
ENDS = """(tab, value, ...others) => {
  const { min, max } = document.querySelector("#SLIDER input[type=range]");
  return [tab, Math.min(max, Math.max(min, value)), ...others];
}"""


def source_of(image):
    """A picture (C, H, W), uint8, as the address of an <img>."""
    return f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"


def outline(mask):
    """The border of a set of pixels (L, L) bool as the path of an SVG, a unit per pixel."""
    inside = np.pad(np.asarray(mask), 1)
    across = np.argwhere(inside[1:, 1:-1] != inside[:-1, 1:-1])  # edges above rows
    down = np.argwhere(inside[1:-1, 1:] != inside[1:-1, :-1])
    return "".join([*(f"M{j} {i}h1" for i, j in across), *(f"M{j} {i}v1" for i, j in down)])


def strip(pictures, kind=""):
    """HTML of small pictures: pairs of (C, H, W) uint8 and a caption. kind: a class of `page.css`, for their size."""
    panel = '<figure><img src="{}" alt="{}"><figcaption>{}</figcaption></figure>'
    figures = (panel.format(source_of(image), *2 * [escape(words)]) for image, words in pictures)
    return f'<div class="strip {kind}">{"".join(figures)}</div>'


def table(head, rows):
    """HTML of a table."""
    lines = ["".join(f"<th>{cell}</th>" for cell in head)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return f'<table class="numbers">{"".join(f"<tr>{line}</tr>" for line in lines)}</table>'


# What the parts of the page show of a tab


def show_picture(tab):
    cone = tab.cone()
    value = {"src": source_of(tab.picture), "L": tab.flow.L, "words": tab.describe(), "region": tab.region}
    return {**value, "pixel": tab.pixel, "outline": "" if cone is None else outline(cone)}


def show_words(tab):
    return f"<p>{escape(tab.describe())}.</p>"


def show_levels(tab):
    captions = ["all levels", *(f"h ≥ {h}" for h in range(1, tab.flow.num_levels))]
    return strip(list(zip(tab.levels, captions, strict=True))[::-1])


def show_latents(tab):
    sizes = tab.magnitudes()
    largest = max(each.nan_to_num().max() for each in sizes).clamp_min(1e-30)
    pictures = []
    for h, size in reversed(list(enumerate(sizes))):
        colours = torch.from_numpy(field_pictures((size / largest).nan_to_num()[None])[0])
        colours = torch.where(size.isnan(), 1.0, colours)
        pictures.append(((255 * colours).round().to(torch.uint8), f"|z| at h = {h}"))
    head, line = ("level", "latents", "mean z²", "−log p in nats per latent"), "{:d} {:,d} {:.3f} {:.3f}"
    rows = [line.format(*each.values()).split() for each in reversed(tab.energies())]
    return strip(pictures) + table(head, rows)


def show_field(tab):
    picture = tab.field()
    if picture is None:
        return "<p>No latent is chosen.</p>"
    cone = tab.cone()
    reach = "any pixel (Real NVP)" if cone is None else f"{int(cone.sum())} of {cone.numel():,} pixels"
    words = f"Receptive field of latent {tab.name} over the picture; it can affect {reach}"
    return strip([(picture, words)], "large")


def show_list(tab):
    choices = [(f"{name} ({strength:.2g})", name) for name, strength in tab.latents]
    where, number = "over all pixels", "strength, the mean of its field"
    if tab.pixel is not None:
        where, number = "at row {}, column {}".format(*tab.pixel), "its field there"
    chosen = tab.name if tab.name in [name for name, _ in tab.latents] else None
    which = "Strongest latents" if tab.flow.layers() else f"Strongest of {SUBSET} random latents per level"
    label = f"{which} {where}, level:row:column:channel ({number})"
    return gr.update(choices=choices, value=chosen, label=label)


def show_value(tab):
    low, high = tab.range()
    name, value = f"Value of latent {tab.name}" if tab.name else "Value of the latent", round(tab.value(), 3)
    return gr.update(minimum=low, maximum=high, value=value, label=name, interactive=tab.name is not None)


def show_region(tab):
    if tab.region is None:
        return "<p>No region is chosen.</p>"
    words, counts = "The {2} × {3} pixels at row {0}, column {1} affect".format(*tab.region), tab.counts()
    if counts is None:
        return f"<p>{words} all latents, as any in Real NVP.</p>"
    affected, total = (sum(each) for each in list(zip(*counts, strict=True))[1:])
    rows = [(h, f"{own:,}", f"{of:,}") for h, own, of in counts[::-1]]
    return f"<p>{words} {affected:,} of {total:,} latents.</p>" + table(("level", "affected", "of"), rows)


def show_second(tab):
    return strip([(tab.second, tab.b.words)])


def show_swap(tab):
    levels = range(tab.flow.num_levels)
    return gr.update(choices=[(f"h = {h}", h) for h in reversed(levels)], value=list(tab.swap))


def show_theta(tab):
    return gr.update(maximum=tab.flow.num_levels, value=tab.theta)


def show_high(tab):
    return tab.high


def show_command(tab):
    reads = [name for name in tab.files() if name != tab.picture_name()]
    words = f"<p>It reads {escape(', '.join(reads))}, which the first button saves too.</p>" if reads else ""
    return f'<p class="command">{escape(tab.picture_command())}</p>{words}'


def show_weights(tab):
    return gr.update(choices=list(tab.known), value=tab.weights)


def show_temperature(h, tab):
    there = h < tab.flow.num_levels
    return gr.update(value=tab.temperature[h] if there else 1.0, visible=there)


def picture_controls(which):
    """Controls that choose the picture "a" or "b": seed of a sample, the next one, number of a test image, its button,
    upload."""
    with gr.Row():
        seed = gr.Number(label="Seed of a sample", min_width=120, elem_id=f"seed_{which}")
        another = gr.Button("Next sample", size="md", min_width=120, elem_id=f"next_{which}")
    with gr.Row():
        number = gr.Number(0, label="Number of a test image", min_width=120, elem_id=f"number_{which}")
        test = gr.Button("Open test image", size="md", min_width=120, elem_id=f"test_{which}")
    upload = gr.UploadButton("Open an image file of yours", size="md", file_types=["image"], elem_id=f"open_{which}")
    return seed, another, number, test, upload


def show_seed(which, tab):
    source = getattr(tab, which)
    return source.name if source.kind == "sample" else None


def method_of(method, first):
    """A method of `Tab` whose first argument is known."""
    return lambda own, *values: method(own, first, *values)


def build(library):
    """The page, a gr.Blocks, on an `explore.Library`."""
    with gr.Blocks(title="RG-Flow explorer", analytics_enabled=False) as page:
        tab = gr.State()
        gr.Markdown("## RG-Flow explorer")
        with gr.Row():
            weights = gr.Dropdown([], label="Weights", scale=3, min_width=200, elem_id="weights")
            other = gr.UploadButton(
                "Open another file of weights", size="md", scale=1, min_width=160, elem_id="open_weights"
            )
        with gr.Row():
            with gr.Column(min_width=320, elem_id="left"):
                picture = gr.HTML(
                    apply_default_css=False, html_template="<span></span>", js_on_load=JS, elem_id="picture"
                )
                words = gr.HTML(apply_default_css=False, elem_id="words")
                gr.Markdown("From the levels h ≥ … alone, lower latents set to 0:")
                levels = gr.HTML(apply_default_css=False, elem_id="levels")
            with gr.Column(min_width=320), gr.Tabs() as tabs:
                with gr.Tab("Picture", id="picture"):
                    first = picture_controls("a")
                    temperatures = [
                        Slider(0, HIGHEST, step=0.05, label=f"Temperature of samples, level h = {h}", elem_id=f"T{h}")
                        for h in range(MOST_LEVELS)
                    ]
                    gr.Markdown("Size of the latents, level by level. White: variables that go up to the next level.")
                    latents = gr.HTML(apply_default_css=False, elem_id="latents")
                with gr.Tab("Latents", id="latents"):
                    gr.Markdown(
                        "Click a pixel of the picture: the latents that act on it most. Choose one to see its receptive"
                        " field and, as a blue line on the picture, its generation cone; drag its value."
                    )
                    listing = gr.Radio([], elem_id="list")
                    value = Slider(-RANGE, RANGE, step=0.05, elem_id="value")
                    with gr.Row():
                        reset = gr.Button("Its own value again", size="md", elem_id="reset")
                        strongest = gr.Button("List the strongest over all pixels", size="md", elem_id="strongest")
                    field = gr.HTML(apply_default_css=False, elem_id="field")
                with gr.Tab("Region", id="region"):
                    gr.Markdown("Drag a rectangle on the picture: the latents of its inference cone. Then inpaint it.")
                    region = gr.HTML(apply_default_css=False, elem_id="region")
                    with gr.Row():
                        steps = gr.Number(STEPS, label="Steps of Adam", elem_id="steps")
                        draws = gr.Number(DRAWS, label="Draws to start from", elem_id="draws")
                    with gr.Row():
                        fill = gr.Button("Inpaint", variant="primary", size="md", elem_id="inpaint")
                        stop = gr.Button("Stop", size="md", elem_id="stop")
                        undo = gr.Button("Picture before", size="md", elem_id="undo")
                    progress = gr.HTML(apply_default_css=False, min_height=90, elem_id="progress")
                with gr.Tab("Mix", id="mix"):
                    gr.Markdown("Levels of the picture are replaced by those of this second picture.")
                    second = gr.HTML(apply_default_css=False, elem_id="second")
                    others = picture_controls("b")
                    theta = Slider(
                        0,
                        MOST_LEVELS,
                        step=1,
                        label="Θ: one picture gives the levels h ≥ Θ, the other those below",
                        elem_id="theta",
                    )
                    high = gr.Radio(
                        [("the picture", True), ("the second picture", False)],
                        value=True,
                        label="The levels h ≥ Θ come from",
                        elem_id="high",
                    )
                    swap = gr.CheckboxGroup([], label="Levels of the second picture", elem_id="swap")
                with gr.Tab("Save", id="save"):
                    gr.Markdown("This command makes the picture again. The file of the picture holds it, too.")
                    command = gr.HTML(apply_default_css=False, elem_id="command")
                    with gr.Row():
                        picture_button = gr.Button("Picture (PNG)", min_width=100, size="md", elem_id="save_picture")
                        latents_button = gr.Button("Latents (.pt)", min_width=100, size="md", elem_id="save_latents")
                        walk_button = gr.Button(
                            "Walk of the last slider (GIF)", min_width=100, size="md", elem_id="save_walk"
                        )
                    files = gr.Files(label="Files", interactive=False, elem_id="files")

        shown = {picture: show_picture, words: show_words, levels: show_levels, latents: show_latents}
        shown |= {field: show_field, listing: show_list, value: show_value, region: show_region, second: show_second}
        shown |= {swap: show_swap, theta: show_theta, high: show_high, command: show_command, weights: show_weights}
        shown |= {slider: partial(show_temperature, h) for h, slider in enumerate(temperatures)}
        shown |= {first[0]: partial(show_seed, "a"), others[0]: partial(show_seed, "b")}

        def show(own, outputs=None, everything=False):
            """What `outputs`, by default all, have to show now, if it is not what they show already."""
            before, own.shown = own.shown, {each: function(own) for each, function in shown.items()}
            same = {} if everything else {each for each, value in own.shown.items() if before.get(each) == value}
            return [gr.skip() if each in same else own.shown[each] for each in outputs or shown]

        def attempt(method, *values):
            """Whether method(*values) succeeds; what it says of bad input becomes a sentence on the page."""
            try:
                method(*values)
            except (UserError, FloatingPointError) as error:
                gr.Warning(str(error), title="Not done")
                return False
            return True

        def alive(own):
            """The `Tab` of an event, which a page that is older than the server does not have."""
            if own is None:
                words = "the explorer was started again: load the page again"
                raise gr.Error(words, title="Not done", print_exception=False)
            return own

        def change(own, outputs, method, *values):
            """Call method(own, *values) and show what has changed, or everything if what the user entered is bad."""

            def call():
                with alive(own).changing():
                    method(own, *values)

            done = attempt(call)
            with own.lock:
                return show(own, outputs, everything=not done)

        def on(event, method, inputs=(), but=(), how=EVENT):
            """Let an event call method(tab, *inputs) and show what has changed, except in the components `but`."""
            outputs = [each for each in shown if each not in but]
            event(lambda own, *values: change(own, outputs, method, *values), [tab, *inputs], outputs, **how)

        def on_slider(slider, method, others=()):
            """Let a slider that is moved call method(tab, its value, *others)."""
            how = {**DRAG, "js": ENDS.replace("SLIDER", slider.elem_id)}
            on(slider.input, method, [slider, *others], [slider], how)

        def on_picture(event, method, keys, name, how):
            """Let an event of the picture call method(tab, its data) and open a part of the page."""

            def handle(own, event: gr.EventData):
                alive(own).newest = max(own.newest, event.number)  # of the events that wait; the others are outdated
                values = [getattr(event, key) for key in keys]
                return change(own, None, lambda own: event.number < own.newest or method(own, values))

            event(lambda: gr.Tabs(selected=name), None, tabs, **EVENT)
            event(handle, [tab], [*shown], trigger_mode="multiple", **how)

        def inpaint(own, steps, draws, progress=gr.Progress()):  # noqa: B008 - so Gradio wants it
            def advance(done, total):
                if done % 5 == 0 or done == total:
                    progress(done / total, desc=f"Inpainting, step {done} of {total}")

            attempt(alive(own).inpaint, steps, draws, advance)
            with own.lock:
                return ["", *show(own)]

        def save(own, method):
            with alive(own).lock:
                attempt(method, own)
                return [str(path) for path in reversed(own.saved.values())]

        def start(request: gr.Request):
            own = library.tabs[request.session_hash] = Tab(library)
            return [own, *show(own)]

        def leave(request: gr.Request):
            if own := library.tabs.get(request.session_hash):
                own.stop()

        page.load(start, None, [tab, *shown], **EVENT)
        page.unload(leave)
        on(weights.input, Tab.open_weights, [weights])
        on(other.upload, Tab.add_weights, [other])
        for which, (seed, another, number, test, upload) in (("a", first), ("b", others)):
            on(seed.input, method_of(Tab.open_sample, which), [seed], [seed], DRAG)
            on(another.click, method_of(Tab.open_next, which))
            for event in (number.submit, test.click):
                on(
                    event,
                    method_of(Tab.open_test, which),
                    [number],
                    how={**EVENT, "show_progress": "full", "show_progress_on": number},
                )
            on(upload.upload, method_of(Tab.open_file, which), [upload])
        for h, slider in enumerate(temperatures):
            on_slider(slider, method_of(Tab.set_temperature, h))

        searching = {**EVENT, "show_progress": "full", "show_progress_on": listing}
        on_picture(picture.pixel, Tab.list_latents, ("row", "column"), "latents", searching)
        on(strongest.click, Tab.list_latents, how=searching)
        on(listing.input, Tab.pick, [listing], [listing])
        on_slider(value, Tab.set_latent)
        on(reset.click, Tab.set_latent)

        on_picture(picture.region, Tab.select, ("row", "column", "height", "width"), "region", EVENT)
        working = {**EVENT, "show_progress": "full", "show_progress_on": progress}
        fill.click(inpaint, [tab, steps, draws], [progress, *shown], **working)
        on(undo.click, Tab.undo)
        stop.click(lambda own: alive(own).stop(), [tab], None, **EVENT)

        on_slider(theta, Tab.set_theta, [high])
        on(high.input, Tab.set_theta, [theta, high])
        on(swap.input, Tab.choose_levels, [swap], [swap])

        making = {**EVENT, "show_progress": "full"}
        methods = Tab.save_picture, Tab.save_latents, Tab.save_walk
        for button, method in zip((picture_button, latents_button, walk_button), methods, strict=True):
            button.click(lambda own, method=method: save(own, method), [tab], files, **making)
        return page
