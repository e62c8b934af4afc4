"""llama.cpp's library: loaded once, checked for what is needed of it, its log in Python's, its devices."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import attrs

from swarmcore.distribution import install_command
from swarmcore.errors import InputError, MissingExtraError
from swarmcore.printable import printable_line

logger = logging.getLogger(__name__)

MAX_SEQUENCES = 256
"""The most that one context of llama.cpp takes."""
CPU = "cpu"

_FUNCTIONS = (
    "llama_backend_init", "llama_batch_free", "llama_batch_init", "llama_context_default_params",
    "llama_decode", "llama_free", "llama_get_memory", "llama_init_from_model", "llama_memory_clear",
    "llama_memory_seq_cp", "llama_memory_seq_rm", "llama_model_default_params",
    "llama_model_free", "llama_model_load_from_file", "llama_model_n_embd", "llama_model_n_layer",
    "llama_model_n_swa",
    "llama_n_ctx", "llama_set_n_threads", "llama_state_get_data", "llama_state_get_size",
    "llama_state_seq_get_data", "llama_state_seq_get_size", "llama_state_seq_set_data",
    "llama_state_set_data",
)  # fmt: skip
_CONTEXT_FIELDS = frozenset(
    {"cb_eval", "flash_attn_type", "kv_unified", "n_outputs_max", "n_outputs_max_per_seq", "n_seq_max"}
    | {"swa_full", "type_k", "type_v"}
)
_MODEL_FIELDS = frozenset({"devices", "n_gpu_layers", "split_mode", "use_extra_bufts"})
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t
_GGML: dict[str, tuple[Any, list[Any]]] = {
    "ggml_backend_dev_count": (_SIZE, []),
    "ggml_backend_dev_description": (ctypes.c_char_p, [_POINTER]),
    "ggml_backend_dev_get": (_POINTER, [_SIZE]),
    "ggml_backend_dev_memory": (None, [_POINTER, ctypes.POINTER(_SIZE), ctypes.POINTER(_SIZE)]),
    "ggml_backend_dev_name": (ctypes.c_char_p, [_POINTER]),
    "ggml_backend_dev_type": (ctypes.c_int, [_POINTER]),
    "ggml_backend_tensor_get": (None, [_POINTER, _POINTER, _SIZE, _SIZE]),
    "ggml_backend_tensor_set": (None, [_POINTER, _POINTER, _SIZE, _SIZE]),
    "ggml_get_data": (_POINTER, [_POINTER]),
    "ggml_get_name": (_POINTER, [_POINTER]),
    "ggml_nbytes": (_SIZE, [_POINTER]),
    "ggml_tensor_overhead": (_SIZE, []),
}
"""Functions of ggml itself: what they return, and take."""
_GPU_KINDS = (1, 2)  # GGML_BACKEND_DEVICE_TYPE_GPU, …_IGPU
_LOG_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}
_LOG_LINES = 20
"""Lines of its warnings and errors that one call into the library may put into the log."""
_LOG_LINE = 500


@attrs.frozen
class Device:
    """One that llama.cpp can put blocks on."""

    name: str
    """As ``--device`` has it: ``"cpu"``, ``"CUDA0"``, ``"Vulkan0"``, ``"Metal"``."""
    description: str
    handle: int | None = None
    """ggml's device; None for the CPU."""


class Library:
    """The loaded library. Made by `library`, once in a process."""

    def __init__(self, llama: ModuleType) -> None:
        self.llama: Any = llama
        self.version = str(getattr(__import__("llama_cpp"), "__version__", "unknown"))
        self._llama_folder = Path(str(llama.__file__)).parent / "lib"
        self.ggml = self.functions(_GGML)
        self._check()
        self._log = _Log()
        self._log_function = llama.llama_log_callback(self._log.receive)
        with self.reporting():
            llama.llama_backend_init()

    def _check(self) -> None:
        llama = self.llama
        missing = [name for name in _FUNCTIONS if not hasattr(llama, name)]
        for structure, needed in (
            ("llama_context_params", _CONTEXT_FIELDS),
            ("llama_model_params", _MODEL_FIELDS),
        ):
            fields = {field[0] for field in getattr(llama, structure)._fields_}
            missing += [f"{structure}.{name}" for name in sorted(needed - fields)]
        if missing:
            raise _unusable(self.version, f"it lacks {', '.join(missing)}")

    def functions(self, wanted: Mapping[str, tuple[Any, list[Any]]]) -> Any:
        """Functions of ggml, which llama.cpp is built on and which lies beside it, as attributes.

        By name, ``wanted`` says what each returns, and takes. Raise `MissingExtraError` when one is missing.
        """
        libraries = []
        for name in ("ggml-base", "ggml"):
            for file in (f"lib{name}.so", f"lib{name}.dylib", f"{name}.dll", f"lib{name}.dll"):
                if (path := self._llama_folder / file).exists():
                    libraries.append(ctypes.CDLL(os.fspath(path)))
                    break
        functions = SimpleNamespace()
        for name, (result, arguments) in wanted.items():
            for found in libraries:
                if (function := getattr(found, name, None)) is not None:
                    function.restype, function.argtypes = result, arguments
                    setattr(functions, name, function)
                    break
            else:
                raise _unusable(self.version, f"it lacks {name}")
        return functions

    @contextmanager
    def reporting(self) -> Iterator[deque[str]]:
        """Within it, what this thread's calls have the library complain of is collected, the last lines."""
        self.llama.llama_log_set(self._log_function, None)  # others in this process may have set theirs
        with self._log.collecting() as lines:
            yield lines

    def devices(self) -> list[Device]:
        """The CPU, and the GPUs that the library was built for and finds here."""
        found = [Device(CPU, "the processor")]
        for index in range(self.ggml.ggml_backend_dev_count()):
            handle = self.ggml.ggml_backend_dev_get(index)
            if self.ggml.ggml_backend_dev_type(handle) in _GPU_KINDS:
                name = self.ggml.ggml_backend_dev_name(handle).decode(errors="replace")
                description = self.ggml.ggml_backend_dev_description(handle).decode(errors="replace")
                found.append(Device(name, printable_line(description), handle))
        return found

    def device(self, name: str) -> Device:
        """The device of that name, in any case of letters. Raise `InputError` when it is not there."""
        devices = self.devices()
        for device in devices:
            if device.name.lower() == name.lower():
                return device
        known = ", ".join(f"{device.name} ({device.description})" for device in devices)
        raise InputError(
            f"llama.cpp has no device {name!r} here; it has {known}. Others need a build of llama-cpp-python "
            f"for them"
        )

    def free_memory(self, device: Device) -> int:
        """Bytes that could be taken on a GPU now, as its driver has it."""
        free, total = _SIZE(), _SIZE()
        self.ggml.ggml_backend_dev_memory(device.handle, ctypes.byref(free), ctypes.byref(total))
        return free.value


@cache
def library() -> Library:
    """llama.cpp, loaded at the first call.

    Raise `MissingExtraError` when it is not installed, or is of a version or build that lacks what is needed
    of it.
    """
    try:
        import llama_cpp.llama_cpp as llama
    except ImportError as exc:
        raise MissingExtraError(
            f"llama-cpp-python is not installed ({exc}); {install_command('ggml')}, which needs a compiler, "
            f"or --executor torch"
        ) from exc
    except (OSError, RuntimeError, AttributeError) as exc:
        raise _unusable("of an unknown version", printable_line(str(exc))) from exc
    return Library(llama)


def _unusable(version: str, why: str) -> MissingExtraError:
    return MissingExtraError(
        f"the installed llama-cpp-python {version} cannot be used: {why}; {install_command('ggml')}, "
        f"or --executor torch"
    )


class _Log:
    """What llama.cpp has to say, line by line, in Python's log."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._level = logging.DEBUG

    @contextmanager
    def collecting(self) -> Iterator[deque[str]]:
        self._local.lines = lines = deque[str](maxlen=_LOG_LINES)
        self._local.logged = 0
        try:
            yield lines
        finally:
            self._local.lines = None

    def receive(self, level: int, text: bytes, _data: object) -> None:
        try:
            self._receive(level, text)
        except Exception:
            # Nothing can be raised through C.
            logger.exception("a line of llama.cpp's log was lost")

    def _receive(self, level: int, text: bytes) -> None:
        self._level = level = _LOG_LEVELS.get(level, self._level)  # lines that go on have no level
        line = printable_line(text[:_LOG_LINE].decode(errors="replace").strip())
        if not line.strip("."):
            return  # its progress
        if level >= logging.WARNING:
            if (lines := getattr(self._local, "lines", None)) is not None:
                lines.append(line)
                self._local.logged += 1
                if self._local.logged > _LOG_LINES:
                    return
            # An error reaches who called, as part of what is raised.
            level = logging.INFO
        logger.log(level, "llama.cpp: %s", line)
