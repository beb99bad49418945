# Everything about the package is declared in pyproject.toml. The compiled extension will be
# declared here once there is one; it comes with the optimizers.
from setuptools import setup

setup()
