"""Installs pit_jax: `pip install -e .`, with the tested versions `pip install -e . -c launch/requirements.lock`."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "pit_jax" / "__init__.py").read_text("utf-8"), re.MULTILINE)[1]
README = ROOT / "README.md"

# jax 0.10.2 is the last release for Python 3.11. The ranges admit the versions of launch/requirements.lock, which are
# the ones that the tests run with, and stop where the next release may break something.
JAX = ">=0.10.2,<0.11"
REQUIRES = [
    f"jax{JAX}",
    f"jaxlib{JAX}",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "tensorflow-datasets>=4.9.10,<5",
    "array_record>=0.8.6,<0.9",
    "etils[epath]>=1.12,<2",
    "importlib_resources>=6",  # TFDS imports it and does not declare it
    "sentencepiece>=0.2.1,<0.3",
    "ml-collections>=1.1,<2",
    "chex>=0.1.92,<0.2",
    "numpy>=2.0,<3",
    "absl-py>=2.1,<3",
    "tqdm>=4.66,<5",
    "tensorboardX>=2.6.2,<3",
]
EXTRAS = {
    "tpu": [f"jax[tpu]{JAX}"],
    "cuda": [f"jax[cuda12]{JAX}"],
    "gcs": ["etils[epath-gcs]>=1.12,<2"],
    "critic": ["openai>=3,<4"],
    "hf": ["safetensors>=0.5,<1", "tokenizers>=0.22,<0.24", "huggingface_hub>=1,<3", "jinja2>=3.1.6,<4"],
    "parquet": ["pyarrow>=18"],
    "report": ["matplotlib>=3.9,<4", "scikit-learn>=1.5,<2"],
    "parity": ["torch>=2.9,<3", "transformers[serving]>=5.20,<6", "peft>=0.17,<1"],
    "test": [
        "pytest>=8,<10",
        "pytest-xdist>=3.6,<4",
        "hypothesis>=6.100,<7",
        "ruff>=0.17.5,<0.18",
        "scikit-learn>=1.5,<2",
        "openai>=3,<4",
        "matplotlib>=3.9,<4",
        "pyarrow>=18",
        *("safetensors>=0.5,<1", "tokenizers>=0.22,<0.24", "jinja2>=3.1.6,<4"),
        # The TPU compiler, for tests without a TPU. jax[tpu] wants another version: the two extras exclude each other.
        "libtpu==0.0.51; platform_system == 'Linux' and platform_machine == 'x86_64'",
    ],
}

setup(
    name="pit_jax",
    version=VERSION,
    description="PIT: a language model that learns from preference pairs to improve its own answers, in JAX",
    long_description=README.read_text("utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["pit_jax", "pit_jax.*"]),
    package_data={
        "pit_jax": ["data/templates/*.txt", "pipelines/prompts/*.txt", "evaluation/prompts/*.txt", "evaluation/*.html"]
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
