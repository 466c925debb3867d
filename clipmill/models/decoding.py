"""A prior prepared to draw one batch: weights in the compute dtype, and a static cache of keys and values.

It computes the same as `Prior.forward`, arranged for few positions at a time. Weights are stored in the layout that
matrix products read fastest. Gains and biases of norms that all samples share are folded into the following weights. A
code enters as a row of a table. Callers compute one position (sequential decoding), a window of positions (parallel
decoding), or a prefix.

R: rows of the batch   n: positions computed at once   S: context, the first positions of the cache   L: all positions
C: channels   N, M: heads of queries, of keys and values   D: channels of a head   K: codes   Q: codebooks
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from clipmill.models.attention import CrossAttention, KeysValues
from clipmill.models.blocks import Block
from clipmill.models.norms import EPS, Norm, standardised
from clipmill.models.places import CONTEXT_MULTIPLE, HostPlaces, Places
from clipmill.models.prior import Prior

__all__ = ["CachedPrior"]

_PREFILL_POSITIONS = 256
"""Positions of a prefix that are computed at once; bounds the size of their mask."""
_PACKED_FOR_ROWS = 64
"""For this many rows oneDNN lays weights out in blocks, which are fast for any number of rows. For one row it would
leave them as they are."""


class _Linear(NamedTuple):
    """A layer as ``x @ weight + bias``."""

    weight: Tensor
    """[in, out], or [out, in] in oneDNN's blocked layout (`_packs`)."""
    bias: Tensor | None
    """[out]."""

    def __call__(self, x: Tensor, activation: Literal["none", "swish"] = "none") -> Tensor:
        """Of x [R * n, in], -> [R * n, out]; ``swish`` is SiLU."""
        if self.weight.is_mkldnn:
            return cast("Tensor", torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, activation, [], ""))
        y = x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)
        return y if activation == "none" else F.silu(y, inplace=True)

    def add_to(self, stream: Tensor, x: Tensor) -> Tensor:
        """The stream plus this layer's output; overwrites the stream or leaves it."""
        if self.weight.is_mkldnn:
            add = torch.ops.mkldnn._linear_pointwise.binary
            return cast("Tensor", add(x, stream, self.weight, self.bias, "add"))
        stream.addmm_(x, self.weight)
        return stream if self.bias is None else stream.add_(self.bias)


class _Layer(NamedTuple):
    """One block."""

    qkv: _Linear
    out: _Linear
    cross_q: _Linear | None
    cross_out: _Linear | None
    up: _Linear
    down: _Linear
    head_gains: Tensor | None
    """Of queries and keys in the modern style, float32 [N + M, D]."""


class _Given(NamedTuple):
    """The encoded labels and conditions of the rows."""

    modulations: Tensor | None
    """Gains and biases of all norms, float32 [2, norms, R, t or 1, C]; None if all rows share them."""
    added: Tensor | None
    """Vector added to the input of each latent frame, [R, t, C]; None without one."""
    memories: list[KeysValues]
    """Keys and values of the condition for each layer; empty without cross-attention."""

    def tensors(self) -> list[Tensor]:
        """The tensors that are set, in a fixed order."""
        parts = (self.modulations, self.added, *(part for memory in self.memories for part in memory))
        return [part for part in parts if part is not None]


class CachedPrior:
    """Computes the logits of positions, given the codes before them; use without gradients.

    Args:
        prior: prior in eval mode.
        num_rows: R.
        label: int64 [R]; None for an unconditional prior.
        condition: as for ``Prior.forward``.
        dtype: dtype of weights, activations and, on a GPU, the cache (float32 on a CPU). Norms are computed in float32,
            and logits are float32.
        hidden: rows whose condition is hidden, bool [R]; None hides no condition.
        step_rows: rows of most products, R * n, which a CPU's layout of weights is chosen for; None is R.
    """

    def __init__(
        self,
        prior: Prior,
        num_rows: int,
        label: Tensor | None,
        condition: Tensor | None,
        dtype: torch.dtype,
        hidden: Tensor | None = None,
        step_rows: int | None = None,
    ) -> None:
        config = prior.config
        self.num_rows, self.dtype, self.modern = num_rows, dtype, config.style == "modern"
        self.heads_shape = (config.num_heads, config.kv_heads, config.head_dim)
        self.num_codes, self.num_codebooks = prior.num_codes, prior.input.num_codebooks
        self.per_frame = math.prod(prior.latent_shape[1:])
        self.normalise: Callable[[Tensor], Tensor] = _unit if self.modern else standardised
        self.norms_per_block = prior.norms_per_block
        self._prior = prior
        self.given, norms = self._take(label, condition, hidden)
        packed = _packs(prior.head.weight.device, dtype, step_rows or num_rows)
        self.layers = [
            _layer(block, prior.norms_of(norms, index), dtype, packed) for index, block in enumerate(_blocks(prior))
        ]
        weights = prior.head.weight.unflatten(0, (self.num_codebooks, self.num_codes))
        self.heads = [_linear(weight, None, dtype, packed, norms[-1]) for weight in weights]
        table = prior.input.table()
        # An additional zero row is the input before the first position.
        self.table = torch.cat((table, torch.zeros_like(table[:1]))).to(dtype)
        self.offsets = prior.input.first_and_offsets(prior.num_positions).to(dtype)  # [L, C]
        self.rotation = (
            None if prior.rotation is None else torch.view_as_complex(prior.rotation.movedim(0, -1).contiguous())
        )
        length = -(-prior.num_positions // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE
        shape = (config.num_layers, 2, num_rows, config.kv_heads, length, config.head_dim)
        self.strided = prior.mask
        # Attention of one query in bfloat16 takes a CPU 1.5 to 4 times as long as in float32.
        cache_dtype = torch.float32 if table.device.type == "cpu" else dtype
        self.cache = torch.zeros(shape, dtype=cache_dtype, device=table.device)
        self.rows = torch.full((num_rows, prior.num_positions + 1), len(table), device=table.device)
        """Row of the table that is the input at each position: that of the code before it."""

    def begin(self, label: Tensor | None, condition: Tensor | None, hidden: Tensor | None = None) -> None:
        """Starts other rows, with arguments of the same shapes. All tensors keep their memory."""
        for kept, new in zip(self.given.tensors(), self._take(label, condition, hidden)[0].tensors(), strict=True):
            kept.copy_(new)
        self.rows.fill_(len(self.table) - 1)
        self.cache.zero_()  # attention multiplies later positions by zero, so they must be finite

    def _take(self, label: Tensor | None, condition: Tensor | None, hidden: Tensor | None) -> tuple[_Given, list[Norm]]:
        """Encodes labels and conditions. Returns them, and the norms that depend on them."""
        prior, dtype = self._prior, self.dtype
        conditioning = prior.conditioning(condition, hidden)
        norms = prior.norms(label, conditioning.offsets)
        memories = []
        if conditioning.memory is not None:
            memories = [
                _memory(cast(CrossAttention, block.cross), conditioning.memory, dtype) for block in _blocks(prior)
            ]
        return _Given(
            None if norms[0].gain.dim() == 1 else _stacked(norms),
            None if conditioning.added is None else conditioning.added.to(dtype),
            memories,
        ), norms

    def put(self, places: Places, codes: Tensor) -> None:
        """Stores the codes int64 [R, n] of some positions, as input of the positions after them."""
        if self.num_codebooks > 1:
            codebooks = torch.arange(places.count, device=codes.device) + places.codebook(self.num_codebooks)
            codes = codes + codebooks % self.num_codebooks * self.num_codes
        places.put(self.rows[:, 1:], 1, codes)

    def prefill(self, codes: Tensor) -> None:
        """Stores codes int64 [R, P] of the first positions, and fills the cache with them."""
        self.put(HostPlaces(0, codes.shape[1]), codes)
        for first in range(0, codes.shape[1], _PREFILL_POSITIONS):
            self._hidden(HostPlaces(first, min(_PREFILL_POSITIONS, codes.shape[1] - first)))

    def logits(self, places: Places) -> Tensor:
        """Logits of the codes at some positions, float32 [R, n, K]. Writes their keys and values into the cache.

        All earlier positions must have been computed with the codes that `put` stored last.
        """
        hidden = self._hidden(places)
        if self.num_codebooks == 1:
            return self.heads[0](hidden).float().unflatten(0, (self.num_rows, -1))
        hidden = hidden.unflatten(0, (self.num_rows, -1))
        logits = hidden.new_empty(*hidden.shape[:2], self.num_codes, dtype=torch.float32)
        for step in range(min(places.count, self.num_codebooks)):
            head = self.heads[(places.codebook(self.num_codebooks) + step) % self.num_codebooks]
            rows = hidden[:, step :: self.num_codebooks]
            logits[:, step :: self.num_codebooks] = head(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
        return logits

    def _hidden(self, places: Places) -> Tensor:
        """The input of the output heads, [R * n, C]."""
        x = F.embedding(places.take(self.rows, 1), self.table).add_(places.take(self.offsets, 0))  # [R, n, C]
        modulations, added, memories = self.given
        if added is not None:
            x += places.frames(self.per_frame, x.device).take(added, 1)
        x = x.flatten(0, 1)
        if modulations is not None and modulations.shape[3] > 1:
            modulations = places.frames(self.per_frame, x.device).take(modulations, 3)
        rotation = None if self.rotation is None else places.take(self.rotation, 0)[:, None]
        seen = (None, places.mask(x.device)) if self.strided is None else places.seen(self.strided)
        for index, layer in enumerate(self.layers):
            norms = iter(range(self.norms_per_block * index, self.norms_per_block * (index + 1)))
            mixed = self._attention(self._norm(x, next(norms), modulations), layer, index, rotation, seen, places)
            x = layer.out.add_to(x, mixed)
            if layer.cross_q is not None and layer.cross_out is not None:
                queries = layer.cross_q(self._norm(x, next(norms), modulations))
                x = layer.cross_out.add_to(x, self._cross(queries, memories[index]))
            x = layer.down.add_to(x, self._activate(layer.up, self._norm(x, next(norms), modulations)))
        return self._norm(x, self.norms_per_block * len(self.layers), modulations)

    def _norm(self, x: Tensor, norm: int, modulations: Tensor | None) -> Tensor:
        """Normalises x [R * n, C], then applies gains and biases [2, norms, R, n or 1, C] if samples have their own."""
        y = self.normalise(x)
        if modulations is None:
            return y
        gain, bias = modulations[:, norm]
        return torch.addcmul(bias, y.view(self.num_rows, -1, y.shape[-1]), gain).to(self.dtype).flatten(0, 1)

    def _activate(self, up: _Linear, x: Tensor) -> Tensor:
        if not self.modern:
            return up(x, "swish")  # the factors of the quick GELU are in the weights around it
        gate, value = up(x).chunk(2, -1)
        return F.silu(gate).mul_(value)

    def _attention(
        self,
        x: Tensor,
        layer: _Layer,
        index: int,
        rotation: Tensor | None,
        seen: tuple[Tensor | None, Tensor | None],
        places: Places,
    ) -> Tensor:
        """Self-attention of x [R * n, C] over the ``seen`` positions of the context (`HostPlaces.seen`) -> [R * n, N *
        D].
        """
        num_heads, kv_heads, head_dim = self.heads_shape
        cache = self.cache[index]
        heads = layer.qkv(x).view(self.num_rows, places.count, -1, head_dim).to(cache.dtype)
        q = heads[:, :, :num_heads]
        if layer.head_gains is not None and rotation is not None:
            turning = _unit(heads[:, :, : num_heads + kv_heads].float()).mul_(layer.head_gains)
            turned = torch.view_as_complex(turning.unflatten(-1, (-1, 2))).mul_(rotation)
            q, k = torch.view_as_real(turned).flatten(-2).to(cache.dtype).split((num_heads, kv_heads), 2)
            places.put(cache[0], 2, k.transpose(1, 2))
            places.put(cache[1], 2, heads[:, :, num_heads + kv_heads :].transpose(1, 2))
        else:
            kv = heads[:, :, num_heads:].unflatten(2, (2, kv_heads)).permute(2, 0, 3, 1, 4)  # [2, R, M, n, D]
            places.put(cache, 3, kv)
        reads, mask = seen
        keys, values = cache[:, :, :, : places.context] if reads is None else cache.index_select(3, reads)
        # Heads that share keys become several queries of one head.
        q = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [R, M, N / M * n, D]
        if mask is not None:
            mask = mask.repeat(num_heads // kv_heads, 1)
        mixed = places.attend(q, keys, values, mask)
        mixed = mixed.unflatten(2, (-1, places.count)).permute(0, 3, 1, 2, 4)
        return mixed.reshape(len(x), -1).to(self.dtype)

    def _cross(self, queries: Tensor, memory: KeysValues) -> Tensor:
        """Cross-attention of queries [R * n, C] to the memory -> [R * n, channels of all values]."""
        num_heads, _, head_dim = self.heads_shape
        q = queries.view(self.num_rows, -1, num_heads, head_dim).transpose(1, 2)
        return F.scaled_dot_product_attention(q, *memory).transpose(1, 2).reshape(len(queries), -1)


# ------------------------------------------------------------------------------------------ weights


def _blocks(prior: Prior) -> list[Block]:
    return cast("list[Block]", list(prior.blocks))


def _layer(block: Block, norms: list[Norm], dtype: torch.dtype, packed: bool) -> _Layer:
    attention, cross = block.attention, block.cross
    qkv, head_gains = attention.qkv.weight, None
    up_scale = 1.0 if block.modern else 1.702
    if attention.qk_gain is not None:  # pairs that are rotated together become neighbours, as real and imaginary parts
        num_turning, head_dim = attention.num_heads + attention.num_kv_heads, attention.qk_gain.shape[1]
        neighbours = torch.arange(head_dim, device=qkv.device).view(2, -1).t().flatten()
        turning, values = qkv.unflatten(0, (-1, head_dim)).split((num_turning, attention.num_kv_heads))
        qkv = torch.cat((turning[:, neighbours], values)).flatten(0, 1)
        counts = torch.tensor((attention.num_heads, attention.num_kv_heads), device=qkv.device)
        head_gains = attention.qk_gain[:, neighbours].repeat_interleave(counts, 0, output_size=num_turning)
    return _Layer(
        qkv=_linear(qkv, None, dtype, packed, norms[0]),
        out=_linear(attention.out.weight, attention.out.bias, dtype, packed),
        cross_q=None if cross is None else _linear(cross.q.weight, None, dtype, packed, norms[1]),
        cross_out=None if cross is None else _linear(cross.out.weight, cross.out.bias, dtype, packed),
        up=_linear(block.up_projection.weight, block.up_projection.bias, dtype, packed, norms[-1], up_scale),
        down=_linear(block.down_projection.weight / up_scale, block.down_projection.bias, dtype, packed),
        head_gains=head_gains,
    )


def _memory(cross: CrossAttention, memory: Tensor, dtype: torch.dtype) -> KeysValues:
    return KeysValues(*(part.to(dtype).contiguous() for part in cross.keys_values(memory)))


def _linear(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, packed: bool, norm: Norm | None = None, scale: float = 1.0
) -> _Linear:
    """The layer of weight [out, in] times ``scale``. A preceding norm that all samples share is folded into it."""
    if norm is not None and norm.gain.dim() == 1:
        if norm.bias is not None:
            bias = weight @ norm.bias + (0 if bias is None else bias)
        weight = weight * norm.gain
    weight = (weight * scale).to(dtype)
    bias = None if bias is None else (bias * scale).to(dtype)
    if packed:
        return _Linear(torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS), bias)
    return _Linear(weight.t().contiguous(), bias)


def _packs(device: torch.device, dtype: torch.dtype, step_rows: int) -> bool:
    """Whether oneDNN multiplies.

    On a CPU it takes 0.5 to 0.75 of the time of MKL for several float32 rows; one float32 row is faster by [in, out].
    In bfloat16 its products took about half the time of `F.linear`; whole draws were not compared.
    """
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return step_rows > 1


def _stacked(norms: list[Norm]) -> Tensor:
    """Gains and biases of all norms, float32 [2, norms, R, t or 1, C]."""
    parts = [torch.stack([part for norm in norms if (part := norm[side]) is not None]) for side in (0, 1)]
    stacked = torch.stack(parts)
    return stacked if stacked.dim() == 5 else stacked.unsqueeze(3)


# ------------------------------------------------------------------------------------------ norms


def _unit(x: Tensor) -> Tensor:
    """Scales x [..., D] to a mean square of one, in float32 inside."""
    if x.device.type != "cpu":
        return F.rms_norm(x, x.shape[-1:], eps=EPS)
    # On a CPU, torch composes RMS norm of several operations; the norm of a vector is a single one.
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return (x * length.square_().mul_(1 / x.shape[-1]).add_(EPS).rsqrt_()).to(x.dtype)
