"""The error tree has two levels below its root, and says what the caller does next."""

from __future__ import annotations

import gc
import inspect

import pytest

from swarmcore import errors
from swarmcore.errors import BusyError, InputError, InternalError, SwarmError, UnavailableError, error_classes

CATEGORIES = (UnavailableError, BusyError, InputError, InternalError)


def test_four_categories_and_one_level_below_them() -> None:
    assert set(SwarmError.__subclasses__()) == set(CATEGORIES)
    for category in CATEGORIES:
        for cls in category.__subclasses__():
            assert cls.__mro__[1:3] == (category, SwarmError)
            assert cls.__subclasses__() == []


def test_every_class_of_the_module_is_in_the_tree_and_documented() -> None:
    defined = {
        cls
        for _, cls in inspect.getmembers(errors, inspect.isclass)
        if cls.__module__ == errors.__name__ and issubclass(cls, BaseException)
    }
    assert defined == {cls for cls in error_classes().values() if cls.__module__ == errors.__name__}
    for cls in defined:
        assert cls.__doc__
        assert cls.__name__.endswith("Error")


def test_details_are_attributes() -> None:
    error = errors.CacheFullError("no room for 10 tokens", retry_after=2.0)
    assert (str(error), error.message) == ("no room for 10 tokens", "no room for 10 tokens")
    assert error.retry_after == 2.0
    assert error.details == {"retry_after": 2.0}
    assert error.origin is None
    with pytest.raises(AttributeError, match="CacheFullError has no detail 'position'"):
        _ = error.position
    assert not hasattr(error, "position")


def test_a_class_of_someone_elses_is_called_by_its_name() -> None:
    cls = type("TheirError", (InputError,), {})
    assert cls.wire_tag == "TheirError"
    del cls
    gc.collect()
