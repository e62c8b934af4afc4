"""Executors of others that use the names of the last version go on to work, with a warning."""

from __future__ import annotations

import pytest

from swarmcore.executor import base


@pytest.mark.parametrize(
    ("old", "new"),
    [("Slice", "ScheduledChunk"), ("SequenceBatch", "TrainingBatch"), ("BatchPass", "TrainingPass")],
)
def test_an_old_name_is_the_new_one(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=new):
        assert getattr(base, old) is getattr(base, new)


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="Piece"):
        _ = base.Piece
