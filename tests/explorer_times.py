#!/usr/bin/env python3
"""How long the explorer's page takes to answer, from a key to the changed picture: a table, a row per file of weights.

OMP_NUM_THREADS=1 python tests/explorer_times.py [NAME…]
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_explore import Visit, chromium

import args as flags
import explore

KEYS = 11  # presses of a key; the median counts, the first is left out


def times(visit, selector, *keys):
    """Milliseconds from a press of one of two keys in turn, on a slider, to another picture: median and largest."""
    visit.page.locator(f"{selector} input[type=range]").focus()
    found = []
    for k in range(KEYS):
        before = visit.page.locator("#picture img").get_attribute("src")
        start = time.perf_counter()
        visit.page.keyboard.press(keys[k % 2])
        visit.page.wait_for_function("old => document.querySelector('#picture img').src != old", arg=before)
        found.append(1000 * (time.perf_counter() - start))
    return f"{statistics.median(found[1:]):.0f} ({max(found[1:]):.0f})"


def main(names):
    files = [str(path) for path in sorted(explore.WEIGHTS.glob("*.state")) if path.stem in names or not names]
    print("| weights | T of h = 3 | latent of h = 3 | of h = 0 | Θ |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        for file in files:
            args = flags.parse(explore.explore_parser(), ["--weights", file, "--fig_dir", folder, "--no_browser"])
            with explore.serving(args) as address:
                visit = Visit(browser, address)
                cells = [times(visit, "#T3", "ArrowRight", "ArrowLeft")]
                visit.show("Latents")
                visit.page.locator("#strongest").click()
                for h in (3, 0):
                    visit.page.locator(f"#list input[value^='{h}:']").first.click(timeout=120_000)
                    visit.page.locator("#value").filter(has_text=f" {h}:").wait_for()
                    cells.append(times(visit, "#value", "PageUp", "PageDown"))
                visit.show("Mix")
                cells.append(times(visit, "#theta", "ArrowRight", "ArrowLeft"))
                visit.page.close()
            print("|", " | ".join([f"`{Path(file).stem}`", *cells]), "|", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
