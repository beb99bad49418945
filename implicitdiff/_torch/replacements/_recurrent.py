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

from implicitdiff._torch.replacements._spelling import Operation, of_aten

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


def _layers(
    cell: Cell,
    x: Tensor,
    states: CellState,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> CellState:
    x = x.movedim(1, 0) if batch_first else x
    directions = 2 if bidirectional else 1
    # Parameters lie in one list, layer by layer, direction by direction.
    each = len(params) // (num_layers * directions)
    ends = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            at = layer * directions + direction
            own, start = params[at * each : (at + 1) * each], tuple(s[at] for s in states)
            # The second direction runs backwards in time, and its outputs are put back in order.
            y, end = _over_time(cell, x.flip(0) if direction else x, start, own, has_biases)
            outputs.append(y.flip(0) if direction else y)
            ends.append(end)
        x = torch.cat(outputs, -1)
    # torch stacks the last states of all layers and directions.
    return (x.movedim(0, 1) if batch_first else x, *(torch.stack(parts) for parts in zip(*ends, strict=True)))


def _replace_layer(op: Operation, cell: Cell, packed_at: int) -> Operation:
    """Return the replacement of a layer.

    torch passes a packed sequence by another overload, with a tensor at position `packed_at`.
    """

    def run(*args: Any, **kwargs: Any) -> CellState:
        # torch.nn passes all arguments by position.
        if kwargs or isinstance(args[packed_at], Tensor):
            return op(*args, **kwargs)  # type: ignore[no-any-return]
        input, states, params, has_biases, num_layers, dropout, train, bidirectional, batch_first = args
        # torch raises for a sequence of length 0.
        if (train and dropout > 0) or input.shape[1 if batch_first else 0] == 0:
            return op(*args)  # type: ignore[no-any-return]
        states = (states,) if isinstance(states, Tensor) else tuple(states)
        return _layers(cell, input, states, params, has_biases, num_layers, bidirectional, batch_first)

    return run


def _replace_cell(op: Operation, cell: Cell) -> Operation:
    """Return the replacement of a cell."""

    def run(
        input: Tensor,
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        state = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        # torch raises for a batch that does not match.
        if any(s.shape[:-1] != input.shape[:-1] for s in state):
            return op(input, hx, w_ih, w_hh, b_ih, b_hh)
        new = cell(functional.linear(input, w_ih, b_ih), functional.linear(state[0], w_hh, b_hh), state)
        return new[0] if isinstance(hx, Tensor) else new

    return run


_lstm = _replace_layer(torch.lstm, _lstm_cell, 1)
_gru, _rnn_tanh, _rnn_relu = (
    _replace_layer(op, cell, 2)
    for op, cell in ((torch.gru, _gru_cell), (torch.rnn_tanh, _tanh_cell), (torch.rnn_relu, _relu_cell))
)
_cells = {
    "lstm_cell": _replace_cell(torch.lstm_cell, _lstm_cell),
    "gru_cell": _replace_cell(torch.gru_cell, _gru_cell),
    "rnn_tanh_cell": _replace_cell(torch.rnn_tanh_cell, _tanh_cell),
    "rnn_relu_cell": _replace_cell(torch.rnn_relu_cell, _relu_cell),
}

REPLACEMENTS: dict[Operation, Operation] = {
    torch.lstm: _lstm,
    torch.gru: _gru,
    torch.rnn_tanh: _rnn_tanh,
    torch.rnn_relu: _rnn_relu,
    **of_aten("input", lstm=_lstm, gru=_gru, rnn_tanh=_rnn_tanh, rnn_relu=_rnn_relu),
    **{getattr(torch, name): replacement for name, replacement in _cells.items()},
    **of_aten(**_cells),
}
