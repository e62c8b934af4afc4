"""Llama's blocks: the arithmetic, on plain arrays in float32."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from swarmcore.errors import UnsupportedModelError

Array = npt.NDArray[np.float32]


@attrs.frozen
class Shape:
    """What the blocks of a model have in common."""

    hidden: int
    heads: int
    kv_heads: int
    head: int
    epsilon: float
    theta: float

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Raise `UnsupportedModelError` for what is not computed here: else it would be wrong in silence."""
        rope = dict(config.rope_parameters or {})
        expected: list[tuple[str, Any, Any]] = [
            ("model_type", config.model_type, "llama"),
            ("hidden_act", config.hidden_act, "silu"),
            ("attention_bias", bool(config.attention_bias), False),
            ("mlp_bias", bool(config.mlp_bias), False),
            ("rope_type", rope.pop("rope_type", "default"), "default"),
        ]
        theta = float(rope.pop("rope_theta", 10_000.0))
        expected += [(name, value, None) for name, value in rope.items()]
        for name, value, wanted in expected:
            if value != wanted:
                raise UnsupportedModelError(f"the executor numpy does not compute {name} {value!r}")
        return cls(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim or config.hidden_size // config.num_attention_heads,
            config.rms_norm_eps,
            theta,
        )

    def rotation(self, start: int, count: int) -> tuple[Array, Array]:
        """Cosines and sines for positions from ``start`` on, ``[tokens, 1, head]``."""
        frequencies = self.theta ** (-np.arange(0, self.head, 2, dtype=np.float32) / self.head)
        angles = np.outer(np.arange(start, start + count, dtype=np.float32), frequencies.astype(np.float32))
        both = np.concatenate([angles, angles], axis=1)[:, None, :]
        return np.cos(both), np.sin(both)


class Block:
    """One transformer layer."""

    def __init__(self, shape: Shape, weights: dict[str, Array]) -> None:
        """``weights`` are named as in the checkpoint, without the layer's prefix."""
        self._shape = shape
        self._norms = weights.pop("input_layernorm.weight"), weights.pop("post_attention_layernorm.weight")
        # Rows times matrix is what is computed, so the matrices are kept the other way round.
        self._matrices = {
            name: np.ascontiguousarray(weights.pop(f"{part}.{name}_proj.weight").T)
            for part, names in (("self_attn", "q k v o"), ("mlp", "gate up down"))
            for name in names.split()
        }
        if weights:
            raise UnsupportedModelError(f"the executor numpy knows no tensor {sorted(weights)[0]}")

    def run(self, rows: Array, keys: Array, values: Array, start: int) -> Array:
        """``rows`` of one sequence, positions from ``start`` on, through the block.

        Their keys and values are written into ``keys`` and ``values``, ``[room, kv heads, head]``, of which
        the rows before ``start`` are read.
        """
        shape, matrices = self._shape, self._matrices
        count, end = len(rows), start + len(rows)
        normed = self._normed(rows, 0)
        query = (normed @ matrices["q"]).reshape(count, shape.heads, shape.head)
        key = (normed @ matrices["k"]).reshape(count, shape.kv_heads, shape.head)
        cosines, sines = shape.rotation(start, count)
        keys[start:end] = _rotated(key, cosines, sines)
        values[start:end] = (normed @ matrices["v"]).reshape(count, shape.kv_heads, shape.head)
        query = _rotated(query, cosines, sines)
        query = query.reshape(count, shape.kv_heads, shape.heads // shape.kv_heads, shape.head)
        scores = np.einsum("tkgd,skd->kgts", query, keys[:end]) / np.float32(np.sqrt(shape.head))
        later = np.arange(end)[None, :] > np.arange(start, end)[:, None]
        scores = np.where(later, np.float32(-np.inf), scores)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        seen = np.einsum("kgts,skd->tkgd", shares, values[:end]).reshape(count, -1)
        rows = rows + seen @ matrices["o"]
        normed = self._normed(rows, 1)
        gate = normed @ matrices["gate"]
        with np.errstate(over="ignore"):  # exp of a large negative gate: the quotient is 0, as it should be
            gate = gate / (1 + np.exp(-gate))
        return rows + (gate * (normed @ matrices["up"])) @ matrices["down"]

    def _normed(self, rows: Array, which: int) -> Array:
        scale = 1 / np.sqrt(np.mean(rows * rows, axis=1, keepdims=True) + np.float32(self._shape.epsilon))
        return rows * scale * self._norms[which]


def _rotated(vectors: Array, cosines: Array, sines: Array) -> Array:
    half = vectors.shape[-1] // 2
    turned = np.concatenate([-vectors[..., half:], vectors[..., :half]], axis=-1)
    return vectors * cosines + turned * sines
