"""Build steps that pyproject.toml cannot express: recipes within the package, and a README without relative links."""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copy the recipes to where `litgpt_whittle.recipes` looks for them; an editable install reads the originals."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for recipe in sorted(Path("config_hub").rglob("*.yaml")):
            target = Path(self.build_lib, "litgpt_whittle", recipe)
            self.mkpath(str(target.parent))
            self.copy_file(str(recipe), str(target))


def standalone(readme: str) -> str:
    """Return the README for a package index, where paths of the source tree lead nowhere: as text, not as links."""
    without_images = re.sub(r"!\[[^\]]*\]\((?!https?://)[^)]+\)\n*", "", readme)
    relative = r"\[([^\]]*)\]\((?!https?://|#)([^)#]+)[^)]*\)"
    without_links = re.sub(
        relative,
        lambda link: f"`{link[2]}`" if link[1].strip("/") == link[2].strip("/") else f"{link[1]} (`{link[2]}`)",
        without_images,
    )
    note = "Paths such as `tutorials/search.md` are those of the source distribution.\n\n"
    title, _, rest = without_links.partition("\n\n")
    return f"{title}\n\n{note}{rest}"


setup(
    cmdclass={"build_py": BuildWithRecipes},
    long_description=standalone(Path("README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
