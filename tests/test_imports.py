"""Large imports are spared the garbage collector, in programs that say so."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

OUTCOME = """
import gc, json, sys
print(json.dumps({
    "imported": "wave" in sys.modules, "frozen": gc.get_freeze_count(), "collecting": gc.isenabled(),
}))
"""


def outcome(program: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", program + OUTCOME], capture_output=True, text=True, check=True, timeout=60
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_in_a_program_of_ours_what_was_imported_is_never_looked_through() -> None:
    found = outcome("from swarmcore.imports import *\nkeep_imports()\nimport_large('wave')")
    assert found["imported"]
    assert found["frozen"] > 1000
    assert found["collecting"]


def test_in_other_programs_nothing_is_done() -> None:
    found = outcome("from swarmcore.imports import *\nimport_large('wave')")
    assert found == {"imported": False, "frozen": 0, "collecting": True}


def test_the_collector_is_on_again_when_an_import_fails() -> None:
    found = outcome(
        "from swarmcore.imports import *\nkeep_imports()\n"
        "try: import_large('wave', 'no_such_module')\nexcept ModuleNotFoundError: pass"
    )
    assert found["imported"]
    assert found["collecting"]


def test_a_collector_that_is_off_stays_off() -> None:
    program = "import gc\ngc.disable()\nfrom swarmcore.imports import *\nkeep_imports()\nimport_large('wave')"
    assert not outcome(program)["collecting"]


def test_commands_are_such_programs() -> None:
    found = outcome(
        "import contextlib, io\nfrom swarmcore.cli import main\nfrom swarmcore.imports import *\n"
        "with contextlib.redirect_stdout(io.StringIO()): main(['sim', '--help'], standalone_mode=False)\n"
        "import_large('wave')"
    )
    assert found["imported"]
    assert found["frozen"] > 1000
