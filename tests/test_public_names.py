"""What users import from mambaflow itself."""

import subprocess
import sys
from importlib import import_module

import pytest

import mambaflow


@pytest.mark.parametrize("name", mambaflow.__all__)
def test_a_public_name_is_the_one_of_its_wing(name):
    assert getattr(mambaflow, name) is getattr(
        import_module(f"mambaflow.{mambaflow._HOMES[name]}"), name
    )
    assert name in dir(mambaflow)


def test_an_unknown_name_is_refused_with_those_that_there_are():
    with pytest.raises(AttributeError, match="no attribute 'Velocity'; it has .*'VelocityField'"):
        mambaflow.Velocity  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Velocity'"):
        from mambaflow import Velocity  # noqa: F401


def test_to_import_the_library_imports_neither_torch_nor_ray():
    code = "import sys, mambaflow; print({'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
