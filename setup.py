"""Packaging is declared in pyproject.toml; this file is where the native extensions are built from."""

from setuptools import setup

setup()
