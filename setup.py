"""Lets tools that know only setup.py install the package; the metadata is in pyproject.toml."""

from setuptools import setup

setup()
