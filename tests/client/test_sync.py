"""The synchronous facade: one loop in a thread, whatever runs in the caller's."""

from __future__ import annotations

import asyncio
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import GenerationConfig

import swarmcore
from swarmcore import sync
from swarmcore.checkpoint import open_checkpoint
from swarmcore.client.generation.model import RemoteModel
from swarmcore.errors import AddressError, InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def loop() -> Iterator[sync.LoopThread]:
    before = loop_threads()
    loop = sync.LoopThread()
    yield loop
    loop.stop()
    assert loop_threads() <= before


def loop_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "swarmcore-sync"}


@pytest.fixture
def waiting_model(loop, llama_folder: Path, sessions, tmp_path: Path) -> Iterator[sync.Model]:
    checkpoint = open_checkpoint(str(llama_folder), cache_dir=tmp_path)
    model = sync.Model(loop, loop.run(RemoteModel.from_checkpoint(checkpoint, sessions, dtype="float32")))
    yield model
    model.close()
    assert all(session.closed for session in sessions.opened)


def test_generate(waiting_model, plain_tokens):
    generation = waiting_model.generate("The sea", max_new_tokens=10)
    pieces = list(generation)
    assert len(pieces) > 1
    assert generation.tokens == plain_tokens("The sea", 10)
    assert "".join(pieces) == waiting_model.tokenizer.decode(generation.tokens, skip_special_tokens=True)
    assert generation.finish_reason == "length"
    assert generation.seconds > 0
    assert waiting_model.generate("The sea", max_new_tokens=10).text() == "".join(pieces)


def test_generate_batch(waiting_model, plain_tokens):
    texts = waiting_model.generate_batch(["a", "The sea"], max_new_tokens=5)
    decode = waiting_model.tokenizer.decode
    assert texts == [decode(plain_tokens(p, 5), skip_special_tokens=True) for p in ("a", "The sea")]


def test_the_models_own_settings_can_be_others(waiting_model, plain_tokens):
    waiting_model.generation_config = GenerationConfig(eos_token_id=256, repetition_penalty=1.7)
    generation = waiting_model.generate("abcabc", max_new_tokens=10)
    generation.text()
    assert generation.tokens == plain_tokens("abcabc", 10, repetition_penalty=1.7)
    with pytest.raises(InputError, match="did you mean temperature"):
        waiting_model.generate("abc", temprature=1.0)


def test_chat(waiting_model):
    with waiting_model.chat(system="Be brief") as chat:
        answer = "".join(chat.say("Hi", max_new_tokens=4))
        assert chat.messages[-1] == {"role": "assistant", "content": answer}
        for _ in chat.say("More", max_new_tokens=20):
            break
        assert "".join(chat.say("More", max_new_tokens=4))


def test_session(waiting_model):
    with waiting_model.session(sequences=2) as session:
        assert session.step([[1, 2], [3]]).shape == (2, 257)
        session.rollback([1, 1])
        assert session.tokens == ((1,), (3,))
        assert waiting_model.generate_batch(["a", "b"], max_new_tokens=2, session=session)


def test_errors_are_raised_where_the_call_was_made(waiting_model):
    with pytest.raises(InputError, match="temperature"):
        waiting_model.generate("a", temperature=-1)
    with pytest.raises(InputError, match="empty"):
        waiting_model.generate("").text()


def test_a_loop_that_is_left_early(waiting_model, sessions):
    generation = waiting_model.generate("The sea")
    for _ in generation:
        break
    generation.close()
    assert sessions.opened[0].closed


async def test_where_a_loop_runs_already(waiting_model):
    assert waiting_model.generate("The sea", max_new_tokens=3).text()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Tests that a shell script runs in the background would ignore Ctrl-C."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def test_an_interrupt_ends_the_generation(waiting_model, sessions, interruptible):
    main = threading.main_thread().ident
    assert main is not None

    async def interrupt() -> None:
        signal.pthread_kill(main, signal.SIGINT)
        await asyncio.Event().wait()

    sessions.stepped = interrupt
    with pytest.raises(KeyboardInterrupt):
        waiting_model.generate("The sea").text()
    assert sessions.opened[0].closed, "it was cleaned up before the interrupt went on"


def test_it_does_not_wait_for_itself(loop):
    async def inside() -> None:
        loop.run(asyncio.sleep(0))

    with pytest.raises(InputError, match="asynchronous"):
        loop.run(inside())


def test_connect_raises_what_the_asynchronous_one_does():
    with pytest.raises(AddressError):
        swarmcore.sync.connect("not an address")


def test_a_process_ends_although_nothing_was_closed():
    program = (
        "import asyncio; from swarmcore.loop_thread import background_loop; "
        "background_loop().run(asyncio.sleep(0)); print('done')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_the_generated_classes_are_up_to_date() -> None:
    faces = runpy.run_path(str(ROOT / ".ci" / "generate_sync.py"))["faces"]
    assert (ROOT / "swarmcore" / "sync" / "faces.py").read_text() == faces(), "run: make sync"


def test_every_public_name_is_there() -> None:
    for name in swarmcore.sync.__all__:
        assert getattr(swarmcore.sync, name) is not None
    with pytest.warns(DeprecationWarning, match=r"sync\.RemoteGeneration now"):
        assert swarmcore.sync.ThinGeneration is swarmcore.sync.RemoteGeneration
