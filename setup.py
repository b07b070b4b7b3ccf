"""Puts the current model of `models/` into wheels as `engine/_models`, and compiles the JPEG region decoder where it can.

Everything else stands in pyproject.toml.
"""

import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py


class BuildWithModel(build_py):
    """Copies `models/CURRENT` and the version it names: older versions beside it stay out of the wheel.

    An editable installation needs no copy: `engine.bundle.packaged` finds `models/` beside the package.
    """

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        models, target = Path("models"), Path(self.build_lib, "engine", "_models")
        shutil.rmtree(target, ignore_errors=True)
        if not (models / "CURRENT").is_file():
            self.announce("models/CURRENT is missing: this wheel carries no model and needs a bundle named by its user", level=3)
            return
        version = (models / "CURRENT").read_text("utf-8").strip()
        shutil.copytree(models / version, target / version)
        shutil.copy(models / "CURRENT", target / "CURRENT")


# Needs a C compiler (Debian: gcc libc6-dev). Where there is none the installation goes on without it, and JPEGs are decoded
# whole (docs/images.md). The library itself is Pillow's.
REGION = Extension(
    "engine._jpeg_region",
    ["engine/_jpeg_region.c", "engine/_jpeg_crop.c"],
    depends=["engine/_jpeg_abi.h", "engine/_jpeg_crop.h"],
    libraries=["dl"],
    optional=True,
    py_limited_api=True,
)

setup(cmdclass={"build_py": BuildWithModel}, ext_modules=[REGION])
