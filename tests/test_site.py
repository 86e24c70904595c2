"""The site: links lead somewhere, nothing is without a page, pages are the same each time; with MkDocs, it builds."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import posixpath
import re
import runpy
import subprocess
import sys
import tomllib
import unicodedata
from pathlib import Path

import pytest
import yaml

import lorakit
from lorakit.assets.cache import root
from lorakit.files import PROJECT
from lorakit.params.whole import QUESTIONS

sys.path.append(str(PROJECT / "scripts"))

import site_pages  # noqa: E402 (found by the line above)

HOOKS = runpy.run_path(str(PROJECT / "scripts" / "site_hooks.py"))
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
README = (PROJECT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return site_pages.pages()


@pytest.fixture(scope="module")
def drawn() -> list[str]:
    return [f"results/{setting}/drawn/{name}.png" for setting in site_pages.settings()
            for name in site_pages.drawings(setting)]  # fmt: skip


def anchors(text: str) -> set[str]:
    """As Python-Markdown makes them of headings."""
    plain = [re.sub(r"[`*]", "", title) for title in re.findall(r"^#+ (.*)$", text, re.M)]
    told = (unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode() for title in plain)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in told}


def broken(pages: dict[str, str], there: set[str]) -> list[str]:
    found = []
    for name, text in pages.items():
        for link in LINK.findall(text):
            path, _, anchor = link.partition("#")
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
            if "://" not in link and (target not in there or anchor and anchor not in anchors(pages[target])):
                found.append(f"{name}: {link}")
    return found


def test_every_link_leads_to_a_page_a_file_or_an_anchor(pages, drawn):
    there = {*pages, *site_pages.files(), *drawn}
    assert broken(pages, there) == []
    assert sum(len(LINK.findall(text)) for text in pages.values()) > 500
    wrong = {"wrong.md": "[a](batches.md#none) [b](gone.md) [`c`](../claims.yaml)"}
    assert len(broken(pages | wrong, there)) == 3
    for name, path in site_pages.files().items():
        for cell in json.loads(path.read_text())["cells"] if name.endswith(".ipynb") else []:
            text = "".join(cell["source"]) if cell["cell_type"] == "markdown" else ""
            beside = {f"notebooks/{link}" for link in LINK.findall(text) if not link.startswith("https://")}
            assert beside <= there and all(link.endswith(".ipynb") for link in beside), name


def test_a_link_to_what_is_not_there_or_not_on_the_site_is_refused():
    assert site_pages.relinked("[a](../README.md#first-results)", "docs/tokens.md") == "[a](index.md#first-results)"
    assert site_pages.relinked("[a](docs/tokens.md)", "README.md") == "[a](tokens.md)"
    assert site_pages.relinked("[a](../results/toy)", "docs/tokens.md") == "[a](results/toy.md)"
    with pytest.raises(ValueError, match=r"docs/tokens.md: link to gone.md, which does not exist"):
        site_pages.relinked("[a](gone.md)", "docs/tokens.md")
    with pytest.raises(ValueError, match="tests/conftest.py: not on the site"):
        site_pages.relinked("[a](../tests/conftest.py)", "docs/tokens.md")


def test_every_page_notebook_and_setting_with_records_is_in_the_navigation(pages):
    asked = yaml.safe_load((PROJECT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = re.findall(r"[\w/-]+\.(?:md|ipynb)", json.dumps(site_pages.expanded(asked)))
    notebooks = {path.relative_to(PROJECT).as_posix() for path in (PROJECT / "notebooks").glob("*.ipynb")}
    tracked = {path.parts[-3] for path in (PROJECT / "results").glob("*/*/*.json")} - {"reviews-minilm"}
    assert sorted(listed) == sorted({*pages, *notebooks})
    assert {f"results/{setting}.md" for setting in tracked} <= set(listed)


def test_each_figure_and_table_of_results_names_its_records_and_params(pages):
    for setting in site_pages.settings():
        text = pages[f"results/{setting}.md"]
        linked = {posixpath.normpath(posixpath.join("results", link)) for link in LINK.findall(text)}
        made = [path.relative_to(PROJECT).as_posix() for path in (PROJECT / "results" / setting).glob("*/*.json")]
        rows = {Path(name).parent.name for name in made if not name.endswith("timing.json")}
        assert {*made, *(f"params/{setting}/{row}.yaml" for row in rows)} <= linked
        after = re.split(r"^!\[.*\n", text, flags=re.M)[1:]
        assert len(after) == len(site_pages.drawings(setting)) > 0
        assert all("Records and params files" in part and ".json)" in part for part in after)


def test_pages_and_figures_are_the_same_each_time(pages):
    """In another process, which hashes otherwise."""
    script = (
        "import hashlib, json, site_pages; print(hashlib.sha256(json.dumps(site_pages.pages()).encode()).hexdigest())"
    )
    path = os.pathsep.join([str(PROJECT / "scripts"), str(PROJECT)])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == hashlib.sha256(json.dumps(pages).encode()).hexdigest()
    one, two = (site_pages.draw("toy", "searches") for _ in range(2))
    assert one == two and one.startswith(b"\x89PNG")


def test_parameters_commands_and_public_names_are_all_there(pages):
    for name in QUESTIONS:
        assert re.search(rf"^\| `{name}[`.]", pages["parameters.md"], re.M), name
    assert "**" not in pages["commands.md"] and "`lorakit plan`" in pages["commands.md"]
    for name in lorakit._PUBLIC:
        line = re.search(rf"`lorakit\.{name}`(?:\]\[([\w.]+)\])?$", pages["api/index.md"], re.M)
        module, _, last = (line[1] or "").rpartition(".")
        value = getattr(lorakit, name)
        assert getattr(importlib.import_module(module), last) is value if module else not callable(value)
    told = [path for text in pages.values() for path in re.findall(r"^::: (\S+)$", text, re.M)]
    assert len(told) == len(set(told)) > 150
    assert all(f"api/{module}.md" in pages for module in lorakit._MODULES)


def test_what_a_browser_would_load_from_elsewhere_is_seen():
    seen = HOOKS["LOADED"].search
    for text in ('<script async src="https://a.b/c.js">', "<img alt='x' src=//a.b/c.png>", '<link href="http://a.b/c.css">',
                 '<style>@import "https://a.b/c.css"</style>', "a{src:url('https://a.b/c.woff')}"):  # fmt: skip
        assert seen(text)
    for text in (
        '<a href="https://a.b">',
        '<script src="../c.js">',
        '<img src="data:image/png;base64,aa//">',
        "url(c)",
    ):
        assert not seen(text)


def test_readme_is_short_and_its_picture_is_seen_where_the_project_is():
    """On the package index a picture needs a whole address: that of the project's repository, once it has one."""
    assert len(README.splitlines()) <= 160
    (picture,) = re.findall(r"^!\[[^\]]+\]\((\S+)\)$", README, re.M)
    urls = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"].get("urls", {})
    address = yaml.safe_load((PROJECT / "CITATION.cff").read_text()).get("repository-code", "")
    assert urls.get("Repository", "") == address and picture.startswith(address)
    assert (
        picture.endswith("results/sst2-minilm/overview.png")
        and (PROJECT / picture[len(address) :].lstrip("/")).exists()
    )


def test_it_builds_without_a_warning_and_asks_no_other_machine(tmp_path):
    if importlib.util.find_spec("mkdocs_jupyter") is None:
        pytest.skip("the extra `site` is not installed: make site")
    if not (root() / HOOKS["MATHJAX"].name / "LICENSE").is_file():
        pytest.skip("MathJax was not fetched yet: make site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    for path in [*tmp_path.rglob("*.html"), *tmp_path.rglob("*.css")]:
        assert not HOOKS["LOADED"].search(path.read_text(encoding="utf-8")), path
    names = [*site_pages.pages(), *site_pages.notebooks()]
    assert all((tmp_path / re.sub(r"\.(md|ipynb)$", ".html", name)).is_file() for name in names)
    lora = (tmp_path / "notebooks" / "01_lora.html").read_text(encoding="utf-8")
    assert lora.count("data:image/png;base64,") > 5 and "../assets/formulas.js" in lora
    assert "No description has been provided" not in lora and 'alt="toy. validation loss (nats) against' in lora
    assert "https://github.com/pytorch/torchtune" in built.stdout
