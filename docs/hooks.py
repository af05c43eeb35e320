"""Hooks of mkdocs that collect the site's pages from the repository and generate those of the API reference."""

import ast
import posixpath
import re
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "litgpt_whittle"
SHOWN = (".md", ".png", ".csv", ".txt")
"""Suffixes of the files that are pages or that pages link to"""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Give headings the anchors that GitHub gives them, since links name those."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Return the files of the site, under their paths in the repository."""
    site = Files(file for file in files if file.src_dir != config.docs_dir)  # those of the theme
    paths = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    paths += [path for folder in ("docs", "tutorials", "benchmarks") for path in (ROOT / folder).rglob("*.*")]
    for path in sorted(paths):
        if path.suffix in SHOWN:
            site.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    names = [page.removeprefix("api/").removesuffix(".md") for page in pages(config.nav) if page.startswith("api/")]
    for name in names:
        text = public_names() if name == "index" else reference(name, names)
        site.append(File.generated(config, f"api/{name}.md", content=text))
    return site


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace links to sources, which are in the repository but not on the site, by text."""

    def replace(link: re.Match) -> str:
        label, target = link.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), target))
        if files.get_file_from_path(path) or not (ROOT / path).exists():
            return link[0]  # a broken link, which the build reports
        return f"`{path}`" if label.strip("/") == path else f"{label} (`{path}`)"

    return re.sub(r"(?<!!)\[([^\]]*)\]\((?!\w+:|#)([^)#]+)\)", replace, markdown)


def pages(nav: str | list | dict) -> list[str]:
    """Return the paths in a navigation."""
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in pages(entry)]


def reference(name: str, names: list[str]) -> str:
    """Return the page of a module; or that of a package, with all of its modules that have no page of their own."""
    folder = PACKAGE / name
    if not folder.is_dir():
        return f"::: litgpt_whittle.{name}\n    options: {{heading_level: 1}}\n"
    modules = [f"{name}.{path.stem}" for path in sorted(folder.glob("*.py")) if path.stem != "__init__"]
    parts = [f"::: litgpt_whittle.{module}\n" for module in modules if module not in names]
    return "\n".join([f"::: litgpt_whittle.{name}\n    options: {{heading_level: 1, members: false}}\n", *parts])


def public_names() -> str:
    """Return a page that lists what `from litgpt_whittle import …` offers."""
    package = griffe.load("litgpt_whittle", search_paths=[ROOT], allow_inspection=False)
    public = ast.literal_eval(str(package["_PUBLIC"].value))
    rows = ["# API reference", "", "| `from litgpt_whittle import …` | |", "| --- | --- |"]
    for name, module in public.items():
        summary = package[f"{module}.{name}"].docstring.value.partition("\n\n")[0].replace("\n", " ")
        rows.append(f"| [`{name}`][litgpt_whittle.{module}.{name}] | {summary} |")
    return "\n".join(rows)
