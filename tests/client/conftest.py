"""Models over a session that needs no network: the blocks of the plain model, in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
import pytest_asyncio
import torch
from byte_tokenizer import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from swarmcore.checkpoint import open_checkpoint
from swarmcore.client.generation.model import RemoteModel
from swarmcore.errors import InvalidStepError, SwarmError
from swarmcore.executor.torch.wire_tensors import to_torch, to_wire
from swarmcore.routing.chain import Chain
from swarmcore.tasks import loop_time
from swarmcore.wire.tensors import Tensor


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@attrs.define(eq=False)
class SentLocally:
    before: list[torch.Tensor]
    """The rows of each sequence that came before the step."""
    result: asyncio.Future[Tensor]
    ended_at: float | None = None
    """None until it is received: more may be sent behind it."""

    @property
    def ended(self) -> bool:
        return self.ended_at is not None

    async def wait(self) -> None:
        await asyncio.Event().wait()


class WholeModelSession:
    """Runs all blocks of a plain transformers model, from scratch at every step.

    Whatever the family, the hidden states are put in front of its first block and taken in front of its final
    norm, by hooks; so this shares no code with what it is there to test.
    """

    def __init__(self, plain: Any, sequences: int) -> None:
        self.plain = plain
        self.sequences = sequences
        self.chain = Chain(())
        self.numerics = ()
        self.cached = (0,) * sequences
        self.rows = [torch.empty(0, plain.config.hidden_size) for _ in range(sequences)]
        self.sent: list[tuple[int, ...]] = []
        """The lengths of every step."""
        self.closed = False
        self.stepped: Callable[[], Awaitable[None]] | None = None
        self.prompts: Sequence[Sequence[int]] = ()
        """What it was opened with."""
        self.namespace = ""
        self.max_in_flight = 4
        self.named: list[list[int]] = []
        """What it consisted of when it was last said."""

    @property
    def positions(self) -> tuple[int, ...]:
        return tuple(map(len, self.rows))

    async def step(
        self,
        hidden: Tensor,
        lengths: Sequence[int],
        *,
        starts: Sequence[int] | None = None,
        sources: Sequence[int] = (),
        reply: str = "last",
    ) -> Tensor:
        assert not self.closed
        if sources:
            self.rows = [self.rows[source] for source in sources]
        assert hidden.shape == (sum(lengths), self.plain.config.hidden_size)
        self.sent.append(tuple(lengths))
        outputs = []
        news = to_torch(hidden).float().split(list(lengths))
        for i, (new, start) in enumerate(zip(news, starts or self.positions, strict=True)):
            if start > len(self.rows[i]):
                raise InvalidStepError(f"sequence {i} has {len(self.rows[i])} tokens, not {start}")
            self.rows[i] = torch.cat([self.rows[i][:start], new])
            if len(new):
                output = through_blocks(self.plain, self.rows[i])
                outputs.append(output[start:] if reply == "all" else output[-1:])
        if self.stepped is not None:
            await self.stepped()
        return to_wire("hidden", torch.cat(outputs))

    async def send(self, hidden: Tensor, lengths: Sequence[int], **options: Any) -> SentLocally:
        before = [row[:start] for row, start in zip(self.rows, options["starts"], strict=True)]
        step = SentLocally(before, asyncio.get_running_loop().create_future())
        try:
            step.result.set_result(await self.step(hidden, lengths, **options))
        except SwarmError as exc:
            step.result.set_exception(exc)
        return step

    async def receive(self, step: SentLocally) -> Tensor:
        step.ended_at = loop_time()
        return await step.result

    async def recall(self, step: SentLocally) -> None:
        self.rows = step.before

    async def name_pages(self, tokens: Sequence[Sequence[int]]) -> None:
        self.named = [list(each) for each in tokens]

    async def close(self) -> None:
        self.closed = True


@torch.inference_mode()
def through_blocks(plain: Any, hidden: torch.Tensor) -> torch.Tensor:
    """``[tokens, hidden size]`` through all blocks of a plain model, without its embeddings and head."""
    base = plain.base_model
    layers = next(getattr(base, name) for name in ("layers", "h") if hasattr(base, name))
    norms = ("norm", "ln_f", "final_layer_norm")
    norm = next(getattr(base, name) for name in norms if hasattr(base, name))
    found: list[torch.Tensor] = []

    def enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (hidden[None], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden[None]}

    hooks = [
        layers[0].register_forward_pre_hook(enter, with_kwargs=True),
        norm.register_forward_pre_hook(lambda module, args: found.append(args[0])),
    ]
    try:
        plain(torch.zeros(1, len(hidden), dtype=torch.long), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0].view(len(hidden), -1)


class Sessions:
    """Opens sessions over one plain model and remembers them."""

    def __init__(self, plain: Any) -> None:
        self.plain = plain
        self.opened: list[WholeModelSession] = []
        self.max_in_flight = 4
        self.stepped: Callable[[], Awaitable[None]] | None = None

    async def __call__(
        self,
        *,
        sequences: int,
        max_tokens: int,
        adapter: None = None,
        prompts: Sequence[Sequence[int]] = (),
        namespace: str = "",
    ) -> WholeModelSession:
        session = WholeModelSession(self.plain, sequences)
        session.prompts, session.namespace = prompts, namespace
        session.stepped = self.stepped
        session.max_in_flight = self.max_in_flight
        self.opened.append(session)
        return session


def save_model(folder: Path, model_type: str, seed: int = 0, **config: Any) -> None:
    """A tiny random model in the transformers format."""
    torch.manual_seed(seed)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))
    for parameter in plain.parameters():
        # Norms and biases as they are made are ones and zeros, which would hide a part that is left out.
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
        else:
            parameter.data.mul_(4)
    plain.generation_config = GenerationConfig(eos_token_id=256, pad_token_id=0)
    plain.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of three blocks over the byte tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    save_model(
        folder,
        "llama",
        vocab_size=257,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=0,
    )
    return folder


@pytest.fixture(scope="session")
def plain(llama_folder: Path) -> Any:
    """The same model as plain transformers runs it."""
    return AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32).eval()


@pytest.fixture
def sessions(plain: Any) -> Sessions:
    return Sessions(plain)


@pytest_asyncio.fixture
async def model(llama_folder: Path, sessions: Sessions, tmp_path: Path) -> AsyncIterator[RemoteModel]:
    """The client's part of it, over `sessions`."""
    checkpoint = open_checkpoint(str(llama_folder), cache_dir=tmp_path)
    model = await RemoteModel.from_checkpoint(checkpoint, sessions, dtype="float32")
    yield model
    await model.close()
    assert all(session.closed for session in sessions.opened)


@pytest.fixture
def plain_tokens(plain: Any) -> Callable[..., list[int]]:
    """What transformers' ``generate`` makes of a prompt: the new tokens."""

    def generate(prompt: str | list[int], tokens: int, seed: int | None = None, **options: Any) -> list[int]:
        ids = torch.tensor([byte_tokenizer()(prompt)["input_ids"] if isinstance(prompt, str) else prompt])
        if seed is not None:
            torch.manual_seed(seed)
        with torch.inference_mode():
            output = plain.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=seed is not None,
                **options,
            )
        return output[0, ids.shape[1] :].tolist()

    return generate
