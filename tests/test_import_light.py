"""`import swarmcore` is quick, and heavy libraries are only loaded by what needs them."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = ("torch", "transformers", "libp2p", "trio", "aiortc", "numpy", "huggingface_hub", "safetensors")
MEASURE = """
import json, sys, time
start = time.process_time()
import {module}
print(json.dumps({"seconds": time.process_time() - start, "modules": list(sys.modules)}))
"""


def measure(module: str = "swarmcore") -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.replace("{module}", module)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    result: dict[str, object] = json.loads(done.stdout)
    return result


def test_the_import_is_light() -> None:
    # Processor time, the best of several: what else the machine does is not the package's fault.
    results = [measure() for _ in range(3)]
    seconds = min(float(str(result["seconds"])) for result in results)
    assert seconds < 0.3, f"import swarmcore takes {seconds:.2f} s"
    modules = results[0]["modules"]
    assert isinstance(modules, list)
    loaded = {str(module).partition(".")[0] for module in modules}
    assert "swarmcore" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_a_server_without_a_head_is_without_a_client() -> None:
    modules = measure("swarmcore.serving")["modules"]
    assert isinstance(modules, list)
    assert "swarmcore.server.block_server" in modules
    assert "swarmcore.client.swarm" not in modules
    assert not set(HEAVY) & {str(module).partition(".")[0] for module in modules}
