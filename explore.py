#!/usr/bin/env python3
"""Explore trained flows in the browser: samples, images of your own, latents, inpainting, mixing."""

import os
import tempfile
import threading
import weakref
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import torch

import args as flags
from data.images import load_single
from flow.fields import get_fields
from utils import cli
from utils.cli import UserError

WEIGHTS = Path(__file__).parent / "weights"
FIRST = "faces_spline_lu"  # of them
LOCAL = "127.0.0.1"
FLOWS = 4  # kept in memory, with their receptive fields, beside those that tabs show
COMPUTING = threading.Lock()  # for receptive fields: torch has forward-mode derivatives in one thread at a time
# Of Gradio: nothing is reported to its makers; statistics, which slow down each event, are left out.
SETTINGS = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(10**9)}
# The browser loads nothing from elsewhere.
POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


def explore_parser():
    parser = flags.weights_parser(__doc__, images=True, several=True, draws=False, dtype="float64")
    add = parser.add_argument_group("explorer").add_argument
    port = cli.number(int, 1, 65535, "a port from 1 to 65535")
    add("--port", type=port, metavar="N", help="port of the page (default: a free one)")
    add("--no_browser", action="store_true", help="only print the address")
    add("--fig_dir", default="./figures", metavar="DIR", help="folder in which receptive fields are kept")
    draws = "draws of z; a receptive field is the mean over them"
    add("--draws", type=cli.positive, default=4, metavar="N", help=draws)
    parser.epilog = "Without --weights and flags of a run: all of weights/."
    return parser


class Library:
    """What the tabs of the browser have in common: files of weights, data sets, flows in memory.

    known: the files of weights, name -> path; folder: for files to save; tabs: those that are open, by their sessions
    flags: of the commands that the page shows; data_flags: those of commands for test images
    """

    def __init__(self, args, folder):
        self.args, self.folder, self.known, self.datasets = args, Path(folder), known_weights(args), {}
        self.tabs, self.flags = weakref.WeakValueDictionary(), [f"--dtype={args.dtype}"]
        given = [name for name in ("data", "data_path", "prepared_path") if name in args.given]
        self.data_flags = {name: getattr(args, name) for name in given}
        self.threads, self._load = [], lru_cache(FLOWS)(self._load)
        self.found = weakref.WeakKeyDictionary()  # receptive fields of flows

    def named(self, path):
        """A file as its owner knows it: an upload without the folder in which it lies here."""
        return Path(path).name if self.folder in Path(path).parents else path

    @contextmanager
    def naming(self, path):
        """Makes a UserError name a file so."""
        try:
            yield
        except UserError as error:
            raise UserError(str(error).replace(str(path), self.named(path))) from error

    def load(self, path):
        """A flow, its configuration and what is known of its training."""
        with self.naming(path):
            return self._load(path, os.path.isfile(path) and os.stat(path).st_mtime_ns)

    def _load(self, path, _):
        flow, config, trained = flags.load_flow(self.args, path)
        return flow.requires_grad_(False), config, trained

    def fields(self, path):
        """The receptive fields of a file's flow, `flow.fields.Fields`, which another file keeps."""
        flow, config, trained = self.load(path)
        if flow not in self.found:
            with COMPUTING:
                if flow not in self.found:
                    given = flow, config, self.args.fig_dir, self.args.draws, 0
                    self.found[flow] = get_fields(*given, weights=trained["weights"])
        return self.found[flow]

    def prepare_fields(self, path):
        """Let `fields` find them, in the background; to errors nobody listens."""

        def compute():
            with suppress(Exception):
                self.fields(path)

        self.threads.append(threading.Thread(target=compute))
        self.threads[-1].start()

    def close(self):
        """Stop what is inpainted, wait for what is computed, and let nothing new begin: a process that ends meanwhile
        crashes."""
        for tab in list(self.tabs.values()):
            tab.stop()
            tab.inpainting.acquire()
            tab.lock.acquire()
        for thread in self.threads:
            thread.join()

    def test_image(self, config, number):
        """An image of the test split: (C, L, L), uint8."""
        key = config["data"], config["nchannels"], config["L"]
        if config["data"] == "folder" and "data_path" not in self.args.given:
            words = "its network was trained on a folder of images that is not here: open images one by one, or start"
            raise UserError(f"test image {number}: {words} explore.py with --weights FILE --data_path FOLDER")
        if key not in self.datasets:
            self.datasets[key] = flags.open_data(config, self.args)[0].test
        images = self.datasets[key]
        if number >= len(images):
            raise UserError(f"test image {number}: must be in 0..{len(images) - 1}")
        return torch.from_numpy(images[number].copy())

    def image(self, config, path):
        """The central square of an image file as uint8 (C, L, L)."""
        with self.naming(path):
            return torch.from_numpy(load_single(path, config["nchannels"], config["L"], fit=True).copy())


def known_weights(args):
    """The files to explore, by their names: {name: path}."""
    paths = args.weights
    if not paths and set(args.run.given) - {"cuda", "data_path"}:
        paths = [str(flags.newest(args.run)[0])]
    found = sorted(WEIGHTS.glob("*.state"), key=lambda path: (path.stem != FIRST, path.stem))
    paths = paths or [os.path.relpath(path) for path in found]
    if not paths:
        raise UserError(f"no weights in {WEIGHTS}: name a file with --weights")
    stems = [Path(path).stem for path in paths]
    return {stem if stems.count(stem) == 1 else path: path for stem, path in zip(stems, paths, strict=True)}


class Policy:
    """An ASGI application, which tells the browser with every answer to load nothing from elsewhere, and to which pages
    from elsewhere cannot send anything."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        sends = scope["type"] == "http" and scope["method"] != "GET"
        if sends and (b"sec-fetch-site", b"cross-site") in scope["headers"]:
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body"})
            return

        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY)]
            await send(message)

        await self.app(scope, receive, send_with_policy)


@contextmanager
def serving(args):
    """Serves the page within: its address. Raises UserError without Gradio, for a file that is no checkpoint, and for a
    port that is taken."""
    with tempfile.TemporaryDirectory(prefix="explore_") as folder:
        library = Library(args, folder)
        for path in library.known.values():
            library.load(path)
        os.environ |= SETTINGS | {"GRADIO_TEMP_DIR": f"{folder}/served"}
        try:
            from starlette.middleware import Middleware
            from starlette.middleware.trustedhost import TrustedHostMiddleware

            from explorer import page
        except ModuleNotFoundError as error:
            if error.name not in ("gradio", "starlette"):
                raise
            raise UserError("the page needs Gradio: python -m pip install -r requirements-explore.txt") from error
        host = os.environ.get("GRADIO_SERVER_NAME", LOCAL)  # a model hub sets it
        checks = [Middleware(Policy)]
        if host == LOCAL:  # no other name, to which a page from elsewhere could have this address given
            checks.append(Middleware(TrustedHostMiddleware, allowed_hosts=[LOCAL, "localhost"]))
        made = page.build(library)
        try:
            _, address, _ = made.launch(
                server_name=host,
                server_port=args.port,
                inbrowser=not args.no_browser,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                ssr_mode=False,
                enable_monitoring=False,
                footer_links=[],
                head=f"<style>{page.CSS}</style>",  # `css` would apply to parts within the container only
                app_kwargs={"middleware": checks},
            )
        except OSError as error:
            raise UserError(f"--port {args.port}: cannot be used, it is taken or reserved") from error
        try:
            yield address
        finally:
            made.close(verbose=False)
            library.close()


def main(argv=None):
    args = flags.parse(explore_parser(), argv)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # with small networks as fast as more, and tabs do not wait for each other
    with serving(args) as address:
        print(f"{address} shows the explorer; Ctrl+C ends it")
        threading.Event().wait()


if __name__ == "__main__":
    cli.script(main)
