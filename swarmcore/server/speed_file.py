"""Measured speeds kept on disk, so that a server that starts again need not measure again."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import attrs
import msgspec

from swarmcore.server.measuring import ComputeSpeed

logger = logging.getLogger(__name__)


MAX_AGE = 30 * 24 * 3600.0
"""Seconds after which a speed is measured anew: what slowed the machine that day is not for good."""


@attrs.frozen
class SpeedFile:
    """Measured speeds on disk, one small file for each ``key``: whatever the speed depends on."""

    folder: Path
    key: Mapping[str, str]
    wall_clock: Callable[[], float] = time.time
    """Seconds since 1970."""

    @property
    def path(self) -> Path:
        digest = hashlib.sha256(msgspec.json.encode(sorted(self.key.items()))).hexdigest()
        return self.folder / f"{digest[:32]}.json"

    def read(self) -> ComputeSpeed | None:
        """What was measured in the last `MAX_AGE` seconds; None when there is nothing, or nothing that makes
        sense."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as exc:
            logger.warning("the measured throughput in %s cannot be read, measuring anew: %s", self.path, exc)
            return None
        try:
            record = msgspec.json.decode(content, type=_Record)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            logger.warning("the measured throughput in %s is damaged, measuring anew: %s", self.path, exc)
            return None
        fresh = 0 <= self.wall_clock() - record.measured_at < MAX_AGE
        if record.key != dict(self.key) or not fresh:
            return None
        return ComputeSpeed(
            record.decode_rps, record.forward_rps, record.decode_threads, record.forward_threads
        )

    def write(self, speed: ComputeSpeed) -> None:
        """Keep ``speed``, all or nothing. A disk that refuses costs a warning: it is measured again then."""
        record = _Record(key=dict(self.key), measured_at=self.wall_clock(), **attrs.asdict(speed))
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part.write_bytes(msgspec.json.format(msgspec.json.encode(record)))
            part.replace(self.path)
        except OSError as exc:
            logger.warning("the measured throughput could not be kept: %s", exc)
            with contextlib.suppress(OSError):
                part.unlink()


class _Record(msgspec.Struct):
    key: dict[str, str]
    decode_rps: Annotated[float, msgspec.Meta(gt=0)]
    forward_rps: Annotated[float, msgspec.Meta(gt=0)]
    measured_at: float = 0.0
    decode_threads: Annotated[int, msgspec.Meta(ge=0)] = 0
    forward_threads: Annotated[int, msgspec.Meta(ge=0)] = 0
