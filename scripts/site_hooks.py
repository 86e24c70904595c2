"""What MkDocs runs for the site: adds the pages of `site_pages`, and refuses a page that would ask another machine.

`python scripts/site_hooks.py` fetches MathJax, once; without it nothing here needs a network.
"""

from __future__ import annotations

import html
import json
import re
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import site_pages  # noqa: E402 (found by the line above)

from lorakit.assets import ASSETS, fetch  # noqa: E402
from lorakit.assets.registry import Asset, Member, Package  # noqa: E402

# formulas: one file, its letters within, so that a page asks for nothing else; kept in the cache of `lorakit fetch`
MATHJAX = Asset(
    name="mathjax-3.2.2",
    kind="data",
    terms="MathJax 3.2.2 (Apache-2.0).",
    notice="LICENSE",
    packages=(
        Package(
            requirement="django-static-mathjax==3.2.2.1",
            file="django_static_mathjax-3.2.2.1-py3-none-any.whl",
            sha256="05ad109fd9e5d9d380c76389689b7f523e9ccb7f7a85c1eb962c7564eac7601d",
            size=10249768,
            members=(
                Member(
                    path="mathjax/static/mathjax/es5/tex-svg-full.js",
                    name="tex-svg-full.js",
                    sha256="214c3da890b16db3d1319684cc04f3fd4e72ea59d5eb3863f256146015fb1783",
                    size=2275095,
                ),
                Member(
                    path="mathjax/static/mathjax/LICENSE",
                    name="LICENSE",
                    sha256="cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30",
                    size=11358,
                ),
            ),
        ),
    ),
)
EXTERNAL = re.compile(r"""<a [^>]*?href=["']?(https?://[^"'\s>]+)""")
# what a browser loads without being asked: scripts, styles, pictures, frames, fonts
LOADED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\bsrc=["']?(?:https?:)?//[^"'\s>]+"""
    r"""|<link\b[^>]*?\bhref=["']?(?:https?:)?//[^"'\s>]+|(?:@import|url\()\s*["']?(?:https?:)?//[^"')\s]+"""
    # a diagram: its program would be loaded then
    r"""|<\w+ class="[^"]*\bmermaid\b""",
    re.I,
)
UNNAMED = re.compile(r'alt="?No description has been provided for this image"?')  # what nbconvert says of every picture
NOTEBOOK = re.compile(r"""(<a [^>]*?href="[\w./-]+)\.ipynb(?=["#])""")  # from one notebook to another, here a page
FOUND: dict[str, set[str]] = {}  # link out of the site -> pages


def mathjax() -> Path:
    """The folder of MathJax in the cache, fetched first where it is not there as pinned.

    Raises:
        AssetError: the package client failed, or a hash differs.
    """
    ASSETS[MATHJAX.name] = MATHJAX
    return fetch(MATHJAX.name)


def on_config(config):
    config.nav = site_pages.expanded(config.nav)
    return config


def on_files(files, config):
    from mkdocs.structure.files import File

    for name, text in site_pages.pages().items():
        if old := files.get_file_from_path(name):
            files.remove(old)
        files.append(File.generated(config, name, content=text))
    for name in site_pages.files():
        files.append(File(name, str(site_pages.PROJECT), config.site_dir, config.use_directory_urls))
    for setting in site_pages.settings():
        for name in site_pages.drawings(setting):
            place = f"results/{setting}/drawn/{name}.png"
            files.append(File.generated(config, place, content=site_pages.draw(setting, name)))
    for member in MATHJAX.members:
        name = f"assets/mathjax/{member.name}"
        files.append(File.generated(config, name, abs_src_path=str(mathjax() / member.name)))
    return files


on_files.mkdocs_priority = 100  # before mkdocs-jupyter looks for notebooks


def on_post_page(output, page, config):
    from mkdocs.exceptions import PluginError

    if asked := LOADED.search(output):
        raise PluginError(f"{page.file.src_uri}: opened, it would ask another machine: {asked[0][:200]}")
    if page.file.src_uri.endswith(".ipynb"):
        output = NOTEBOOK.sub(r"\1.html", output)
        said = iter(alternatives(Path(page.file.abs_src_path)))
        output = UNNAMED.sub(lambda found: f'alt="{html.escape(next(said))}"', output)
    for link in EXTERNAL.findall(output):
        FOUND.setdefault(link, set()).add(page.file.src_uri)
    return output


def alternatives(notebook: Path) -> list[str]:
    """What each picture of a notebook shows, in words, as its output's metadata say: nbconvert's page does not."""
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    shown = [output for cell in cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})]
    return [output["metadata"]["image/png"]["alt"] for output in shown]


def on_post_build(config):
    lines = [f"{link}  ({', '.join(sorted(pages))})" for link, pages in sorted(FOUND.items())]
    print(f"{len(lines)} links lead out of the site (not followed):", *lines, sep="\n  ")


if __name__ == "__main__":
    print(mathjax())
