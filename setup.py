"""Packaging: `pip install .` gives the package llm_core and the command run-llm.

The wheel holds llm_core alone. Its configs live at the top of the repository, where users read and copy them;
the build puts a copy into llm_core/configs, so that an installed run-llm finds them from anywhere. llm_core/kernels is
a link to kernels/: the wheel holds its sources, and the libraries that the compiler at hand can make of them. Without
a compiler it is a wheel for every platform, whose kernels are compiled on first use. The CUDA kernels' library is part
of the wheel only where CUDA_ARCHS says for which GPUs: CUDA_ARCHS="80 90 90a" pip wheel . (docs/cuda.md).
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # pip does not put it there

from llm_core.kernels import ISAS, KernelsUnavailable, nvcc  # noqa: E402  standard library only
from llm_core.kernels.build import SOURCES, ship  # noqa: E402
from llm_core.kernels.compiler import cpu_target  # noqa: E402


class BuildPy(build_py):
    """build_py, fresh copies of configs/ inside the package, and the kernels; an editable install needs none of it."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "llm_core" / "configs"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(HERE / "configs", target)
        libraries = self.libraries()
        shutil.rmtree(libraries, ignore_errors=True)
        for isa in ISAS:
            try:
                self.announce(f"kernels: {ship(cpu_target(isa, SOURCES), libraries).name}", level=2)
            except KernelsUnavailable as error:
                self.warn(f"this wheel has no kernels for {isa}: {error}")
        if os.environ.get("CUDA_ARCHS"):  # asked for by name: a build that cannot serve it fails
            self.announce(f"kernels: {ship(nvcc.cuda_target(nvcc.architectures()), libraries).name}", level=2)

    def libraries(self) -> Path:
        """Where the kernels' libraries are put."""
        return Path(self.build_lib) / "llm_core" / "kernels" / "lib"


class BdistWheel(bdist_wheel):
    """bdist_wheel, which learns from what has been built whether the wheel is for this platform alone."""

    def run(self):
        self.run_command("build")
        if any(self.get_finalized_command("build_py").libraries().glob("*.so")):
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True  # installed where code for one platform goes
        super().run()

    def get_tag(self):
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


setup(
    name="run_llm",
    version="0.1.0",
    description="Train, fine-tune, evaluate and run Llama 2, Falcon and InternLM on MindSpore",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["llm_core", "llm_core.*"]),
    package_data={"llm_core.kernels": ["abi/*", "cpu/*", "cuda/*", "cuda/emulator/*"]},
    cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel},
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
        "test": ["pytest", "pytest-xdist", "ruff", "jsonschema", "setuptools>=70.1", "gguf>=0.17"],
        # the oracles of tests and benchmarks; llm_core never imports them
        "parity": ["torch==2.13.0", "transformers==4.57.1", "peft"],
        "tensorboard": ["tensorboard"],
        "gguf": ["gguf>=0.17"],  # tools/convert_weight.py reads GGUF files with it
        # in an environment of its own: it wants another MindSpore and other versions of much else (make mindformers)
        "mindformers": ["mindformers==1.9.0"],
    },
)
