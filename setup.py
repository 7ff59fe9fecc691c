"""Packaging: `pip install .` gives the package llm_core and the command run-llm.

The wheel holds llm_core alone. Its configs live at the top of the repository, where users read and copy them;
the build puts a copy into llm_core/configs, so that an installed run-llm finds them from anywhere.
"""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent


class BuildWithConfigs(build_py):
    """build_py, and a fresh copy of configs/ inside the package (an editable install reads the original)."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "llm_core" / "configs"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(HERE / "configs", target)


setup(
    name="run_llm",
    version="0.1.0",
    description="Train, fine-tune, evaluate and run Llama 2 (next: Falcon, InternLM) on MindSpore",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["llm_core", "llm_core.*"]),
    cmdclass={"build_py": BuildWithConfigs},
    entry_points={"console_scripts": ["run-llm = llm_core.cli:main"]},
    install_requires=[
        "mindspore>=2.9,<2.11",
        "numpy<2",
        "pyyaml",
        "pydantic>=2,<3",
        "sentencepiece",
        "tokenizers",
        "fschat",
        "safetensors",
        "tqdm",
        "jinja2",
        "jieba",
        "matplotlib",
    ],
    extras_require={
        "test": ["pytest", "ruff", "jsonschema"],
        # the oracles of tests and benchmarks; llm_core never imports them
        "parity": ["torch==2.13.0", "transformers==4.57.1", "peft"],
        "tensorboard": ["tensorboard"],
    },
)
