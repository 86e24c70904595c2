"""Besides the package a wheel holds what `lorakit init` lays out: the project's folders, as lorakit/project."""

import runpy
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithProject(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:  # there the clone around the package is at hand
            project = Path(self.build_lib, "lorakit", "project")
            shutil.rmtree(project, ignore_errors=True)  # of an earlier build
            runpy.run_path("lorakit/runs/layout.py")["lay_out"](Path.cwd(), project)


setup(cmdclass={"build_py": WithProject})
