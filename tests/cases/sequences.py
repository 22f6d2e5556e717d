"""Attention and recurrence: where the row axis is not always first, and a length can equal the number of rows."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from cases.table import Case, integers, normal


def padding(lengths: Tensor, t: int) -> Tensor:
    """[n, t], true where there is nothing."""
    return torch.arange(t) >= lengths[:, None]


class Attention(nn.Module):
    """Self-attention in either layout, with or without a padding mask."""

    def __init__(self, batch_first: bool, masked: bool = False, **options: object) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)
        self.batch_first, self.masked = batch_first, masked

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        mask = padding(lengths, x.shape[1]) if self.masked else None
        x = x if self.batch_first else x.transpose(0, 1)
        out, weights = self.attention(x, x, x, key_padding_mask=mask)
        out = out if self.batch_first else out.transpose(0, 1)
        return torch.cat([out.flatten(1), weights.flatten(1)], dim=1)


class CrossAttention(nn.Module):
    """Learned queries, which have no row axis before they are expanded, look at the row; all by keyword."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(3, 4))
        self.ask = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, kdim=5, vdim=6, batch_first=batch_first)
        self.batch_first = batch_first

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        queries = self.ask(self.queries).expand(len(keys), -1, -1)
        if self.batch_first:
            return self.attention(query=queries, key=keys, value=values, need_weights=False)[0]
        sides = {"query": queries, "key": keys, "value": values}
        out, _ = self.attention(**{name: side.transpose(0, 1) for name, side in sides.items()})
        return out.transpose(0, 1)


class Encoder(nn.Module):
    """A TransformerEncoderLayer in either layout, a stack of them, or one with a padding mask."""

    def __init__(self, batch_first: bool, depth: int = 0, masked: bool = False, **options: object) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, batch_first=batch_first, **options)
        self.body = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False) if depth else layer
        self.batch_first, self.masked = batch_first, masked

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        mask = padding(lengths, x.shape[1]) if self.masked else None
        if self.batch_first:
            return self.body(x, src_key_padding_mask=mask)
        return self.body(x.transpose(0, 1), src_key_padding_mask=mask).transpose(0, 1)


class Decoder(nn.Module):
    """A TransformerDecoderLayer over its own projection of the row as memory."""

    def __init__(self, batch_first: bool, norm_first: bool) -> None:
        super().__init__()
        self.memory = nn.Linear(4, 4)
        self.body = nn.TransformerDecoderLayer(
            4, 2, dim_feedforward=6, batch_first=batch_first, norm_first=norm_first
        )
        self.batch_first = batch_first

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        memory = self.memory(source)
        if self.batch_first:
            return self.body(target, memory)
        return self.body(target.transpose(0, 1), memory.transpose(0, 1)).transpose(0, 1)


class Translator(nn.Module):
    """The whole nn.Transformer, time first."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():  # torch says that time first is slower
            warnings.simplefilter("ignore")
            self.body = nn.Transformer(4, 2, 1, 1, dim_feedforward=6, activation="gelu")

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        causal = torch.full((target.shape[1],) * 2, float("-inf"), dtype=target.dtype).triu(1)
        return self.body(source.transpose(0, 1), target.transpose(0, 1), tgt_mask=causal).transpose(0, 1)


class Recurrent(nn.Module):
    """A recurrent layer in either layout, read at every step and at its last state."""

    def __init__(self, layer: nn.Module, embed: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.embed = nn.Embedding(6, layer.input_size) if embed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        out, state = self.layer(x if self.layer.batch_first else x.transpose(0, 1))
        out = out if self.layer.batch_first else out.transpose(0, 1)
        last = state[0] if isinstance(state, tuple) else state
        return torch.cat([out.flatten(1), last.transpose(0, 1).flatten(1)], dim=1)


class Seeded(nn.Module):
    """A GRU that starts from a state made of the row, and is then called again on what it said."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.layer, self.back = nn.Linear(3, 4), nn.GRU(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        steps = x.transpose(0, 1)
        out, state = self.layer(steps, self.start(x[:, 0])[None].contiguous())
        again, _ = self.layer(self.back(out[:2]), state)
        return again.transpose(0, 1)


class CellLoop(nn.Module):
    """A cell called once for every step."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cell, self.out = kind(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.out(state[0] if isinstance(state, tuple) else state)


class Packed(nn.Module):
    """Packed sequences: inside, the rows are sorted by length and there is no row axis at all."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.embed, self.layer, self.out = nn.Embedding(6, 3), kind(3, 4, bidirectional=True), nn.Linear(8, 2)

    def forward(self, index: Tensor, lengths: Tensor) -> Tensor:
        steps = self.embed(index).transpose(0, 1)
        packed, _ = self.layer(pack_padded_sequence(steps, lengths.cpu(), enforce_sorted=False))
        out, _ = pad_packed_sequence(packed, total_length=index.shape[1])
        return self.out(out.transpose(0, 1))


class Block(nn.Module):
    """One pre-norm block of a small GPT."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(n, t, width))
        return x + self.mlp(self.norm2(x))


class TinyGPT(nn.Module):
    """Tied input and output embeddings, learned positions without a row axis."""

    def __init__(self, vocabulary: int = 7, width: int = 4, context: int = 8) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.token.weight

    def forward(self, index: Tensor) -> Tensor:
        x = self.token(index) + self.position(torch.arange(index.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def next_token(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The sum over tokens of the next token's loss, padding masked."""
    index, lengths = batch
    targets = index[:, 1:].masked_fill(padding(lengths, index.shape[1])[:, 1:], -100)
    logits = model(index[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none").sum(1)


def mean_token(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean over the row's own tokens."""
    return next_token(model, batch) / (batch[1] - 1)


_ATTENTION = {
    "attention": {},
    "attention_no_bias": {"bias": False},
    "attention_bias_kv": {"add_bias_kv": True},
}

CASES = [
    *(
        Case(f"{name}_{'batch' if first else 'time'}_first",
             lambda first=first, options=options: Attention(first, **options),
             [normal(3, 4), integers(1, 4)])
        for name, options in _ATTENTION.items() for first in (True, False)
    ),
    *(
        Case(f"attention_padding_mask_{'batch' if first else 'time'}_first",
             lambda first=first: Attention(first, masked=True), [normal(3, 4), integers(1, 4)])
        for first in (True, False)
    ),
    *(
        Case(f"cross_attention_{'batch' if first else 'time'}_first",
             lambda first=first: CrossAttention(first), [normal(3, 5), normal(3, 6)])
        for first in (True, False)
    ),
    *(
        Case(f"encoder_layer_{'batch' if first else 'time'}_first{'_norm_first' * pre}_t{t}",
             lambda first=first, pre=pre: Encoder(first, norm_first=pre), [normal(t, 4), integers(1, 4)])
        for first, pre, t in ((True, False, 3), (True, True, 3), (False, False, 3), (False, True, 7))
    ),
    Case("encoder_layer_padding_mask", lambda: Encoder(True, masked=True), [normal(3, 4), integers(1, 4)]),
    Case("encoder_layer_no_bias_gelu", lambda: Encoder(False, bias=False, activation="gelu"),
         [normal(3, 4), integers(1, 4)]),
    Case("encoder_stack", lambda: Encoder(True, depth=2), [normal(3, 4), integers(1, 4)]),
    Case("encoder_stack_time_first", lambda: Encoder(False, depth=2, masked=True),
         [normal(3, 4), integers(1, 4)]),
    *(
        Case(f"decoder_layer_{'batch' if first else 'time'}_first{'_norm_first' * pre}",
             lambda first=first, pre=pre: Decoder(first, pre), [normal(3, 4), normal(2, 4)])
        for first in (True, False) for pre in (True, False)
    ),
    Case("transformer", Translator, [normal(3, 4), normal(2, 4)]),
    *(
        Case(f"{kind.__name__.lower()}_{'batch' if first else 'time'}_first_bidirectional_t{t}",
             lambda kind=kind, first=first: Recurrent(kind(3, 4, batch_first=first, bidirectional=True)),
             [normal(t, 3)])
        for kind in (nn.LSTM, nn.GRU, nn.RNN) for first, t in ((True, 3), (False, 3), (False, 7))
    ),
    Case("lstm_two_layers", lambda: Recurrent(nn.LSTM(3, 4, num_layers=2)), [normal(3, 3)]),
    Case("lstm_projected", lambda: Recurrent(nn.LSTM(3, 4, proj_size=2, batch_first=True)), [normal(3, 3)]),
    Case("lstm_no_bias_dropout", lambda: Recurrent(nn.LSTM(3, 4, num_layers=2, bias=False, dropout=0.5)),
         [normal(3, 3)]),
    Case("rnn_relu", lambda: Recurrent(nn.RNN(3, 4, nonlinearity="relu")), [normal(3, 3)]),
    Case("lstm_on_embedding", lambda: Recurrent(nn.LSTM(3, 4), embed=True), [integers(0, 6, 3)]),
    Case("lstm_frozen_recurrence", lambda: _freeze(Recurrent(nn.LSTM(3, 4)), "layer.weight_hh_l0"), [normal(3, 3)]),
    Case("gru_seeded_and_called_again", Seeded, [normal(3, 3)]),
    Case("lstm_cell_loop", lambda: CellLoop(nn.LSTMCell), [normal(3, 3)]),
    Case("gru_cell_loop", lambda: CellLoop(nn.GRUCell), [normal(3, 3)]),
    Case("packed_lstm", lambda: Packed(nn.LSTM), [integers(0, 6, 5), integers(1, 6)]),
    Case("packed_gru", lambda: Packed(nn.GRU), [integers(0, 6, 3), integers(1, 4)]),
    Case("tiny_gpt", TinyGPT, [integers(0, 7, 5), integers(2, 6)], loss=next_token),
    Case("tiny_gpt_mean_over_tokens", TinyGPT, [integers(0, 7, 4), integers(2, 5)], loss=mean_token),
]  # fmt: skip


def _freeze(model: nn.Module, name: str) -> nn.Module:
    model.get_parameter(name).requires_grad_(False)
    return model
