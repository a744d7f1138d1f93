import jaxtyping
import pytest


@pytest.fixture
def without_shape_checks(monkeypatch):
    """The library as its users run it: annotations are checked in tests alone."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
