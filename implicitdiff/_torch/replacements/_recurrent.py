"""Recurrent layers and cells, by elementary operations for each time step.

torch has no batching rules for recurrent layers (pytorch #105982, #134606, #112459), and fused kernels lack second
derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import implicitdiff._torch.trees as pytree
from implicitdiff._torch.replacements._spelling import Operation, of_aten, only_if

CellState = tuple[Tensor, ...]
"""Hidden state h, and for an LSTM the cell state c. The first tensor is the output."""
Cell = Callable[[Tensor, Tensor, CellState], CellState]
"""``cell(a, b, state) -> state`` with ``a = W_ih x + b_ih`` and ``b = W_hh h + b_hh``."""


def _lstm_cell(a: Tensor, b: Tensor, state: CellState) -> CellState:
    # c' = f c + i g, h' = o tanh(c'); the order of gates is that of torch.nn.LSTM.
    i, f, g, o = (a + b).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_cell(a: Tensor, b: Tensor, state: CellState) -> CellState:
    # h' = (1 - z) n + z h, with the reset gate applied after the product W_hn h, as in torch.nn.GRU.
    (r, z, n), (h_r, h_z, h_n) = a.chunk(3, -1), b.chunk(3, -1)
    n, z = (n + (r + h_r).sigmoid() * h_n).tanh(), (z + h_z).sigmoid()
    return (n + z * (state[0] - n),)


def _tanh_cell(a: Tensor, b: Tensor, state: CellState) -> CellState:
    return ((a + b).tanh(),)


def _relu_cell(a: Tensor, b: Tensor, state: CellState) -> CellState:
    return ((a + b).relu(),)


def _over_time(
    cell: Cell, x: Tensor, state: CellState, params: Sequence[Tensor], biased: bool
) -> tuple[Tensor, CellState]:
    # Parameters in torch's order: w_ih, w_hh, biases if any, and the projection of an LSTM with proj_size.
    w_ih, w_hh = params[:2]
    b_ih, b_hh = params[2:4] if biased else (None, None)
    # The projection is the last parameter, and the only source of an odd number.
    projection = params[-1] if len(params) % 2 else None
    outputs = []
    # One product serves the inputs of all times; only the recurrent product waits for the state.
    for a in functional.linear(x, w_ih, b_ih).unbind(0):
        h, *rest = cell(a, functional.linear(state[0], w_hh, b_hh), state)
        state = (h if projection is None else functional.linear(h, projection), *rest)
        outputs.append(state[0])
    return torch.stack(outputs), state


def _backwards_in_time(
    cell: Cell, x: Tensor, state: CellState, params: Sequence[Tensor], biased: bool
) -> tuple[Tensor, CellState]:
    outputs, end = _over_time(cell, x.flip(0), state, params, biased)
    return outputs.flip(0), end


def _layers(
    cell: Cell,
    x: Tensor,
    states: CellState,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
) -> CellState:
    directions = [_over_time, _backwards_in_time] if bidirectional else [_over_time]
    # Parameters lie in one list, layer by layer, direction by direction.
    each = len(params) // (num_layers * len(directions))
    ends: list[CellState] = []
    for _ in range(num_layers):
        outputs = []
        for run in directions:
            at = len(ends)
            own, start = params[at * each : (at + 1) * each], tuple(s[at] for s in states)
            y, end = run(cell, x, start, own, has_biases)
            outputs.append(y)
            ends.append(end)
        x = torch.cat(outputs, -1)
    # torch stacks the last states of all layers and directions.
    return (x, *(torch.stack(parts) for parts in zip(*ends, strict=True)))


def _replace_layer(cell: Cell) -> Operation:
    """Return the replacement of a layer."""

    def run(*args: Any, **kwargs: Any) -> CellState:
        # torch.nn passes all arguments by position.
        only_if(len(args) == 9)
        input, states, params, has_biases, num_layers, dropout, train, bidirectional, batch_first = args
        # Of a packed sequence torch passes the sizes of batches second, and the other arguments one place later.
        only_if(isinstance(has_biases, bool), not (train and dropout > 0))
        if batch_first:
            x, *ends = run(input.movedim(1, 0), *args[1:-1], False)
            return x.movedim(0, 1), *ends
        # torch raises for a sequence of length 0.
        only_if(input.shape[0] > 0)
        states = tuple(pytree.tensors(states))
        return _layers(cell, input, states, params, has_biases, num_layers, bidirectional)

    return run


def _replace_cell(cell: Cell) -> Operation:
    """Return the replacement of a cell."""

    def run(
        input: Tensor,
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        state = tuple(pytree.tensors(hx))
        # torch raises for a batch that does not match.
        only_if(*[s.shape[:-1] == input.shape[:-1] for s in state])
        new = cell(functional.linear(input, w_ih, b_ih), functional.linear(state[0], w_hh, b_hh), state)
        return new[0] if isinstance(hx, Tensor) else new

    return run


_CELLS = _lstm_cell, _gru_cell, _tanh_cell, _relu_cell
_lstm, _gru, _rnn_tanh, _rnn_relu = map(_replace_layer, _CELLS)
_one_lstm, _one_gru, _one_rnn_tanh, _one_rnn_relu = map(_replace_cell, _CELLS)

REPLACEMENTS: dict[Operation, Operation] = {
    torch.lstm: _lstm,
    torch.gru: _gru,
    torch.rnn_tanh: _rnn_tanh,
    torch.rnn_relu: _rnn_relu,
    torch.lstm_cell: _one_lstm,
    torch.gru_cell: _one_gru,
    torch.rnn_tanh_cell: _one_rnn_tanh,
    torch.rnn_relu_cell: _one_rnn_relu,
    **of_aten("input", lstm=_lstm, gru=_gru, rnn_tanh=_rnn_tanh, rnn_relu=_rnn_relu),
    **of_aten(lstm_cell=_one_lstm, gru_cell=_one_gru, rnn_tanh_cell=_one_rnn_tanh, rnn_relu_cell=_one_rnn_relu),
}
