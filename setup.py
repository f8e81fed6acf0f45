"""cffi's build hook is a setup() keyword that pyproject.toml cannot express; everything else is there."""

from setuptools import setup

setup(cffi_modules=["pyvmm/native/build.py:ffibuilder"])
