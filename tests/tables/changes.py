"""What may happen between a call and its derivative to what a function uses: `CHANGES`.

A change makes a function ``fn(x, t) = s x^2 - t`` with a known s, and what is called before the derivative. The
derivative is that of the s of the call, or an error; of `exact` ones it has to be right.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from checks.tensors import number
from torch import Tensor, nn

F64 = torch.float64
Residual = Callable[[Tensor, Tensor], Tensor]


class Change(NamedTuple):
    name: str
    make: Callable[[], tuple[Residual, Callable[[], Any]]]
    s: float
    exact: bool
    outside: bool = False  # whether torch refuses the change inside of a transform

    def __str__(self) -> str:
        return self.name


CHANGES: list[Change] = []


def right(s: float = 1.0, **options: Any) -> Callable[..., Any]:
    return lambda make: CHANGES.append(Change(make.__name__, make, s, exact=True, **options))


def right_or_refused(s: float = 1.0, **options: Any) -> Callable[..., Any]:
    return lambda make: CHANGES.append(Change(make.__name__, make, s, exact=False, **options))


# --- variables and containers -----------------------------------------------------------------------------------------


@right()
def nothing():
    return lambda x, t: x**2 - t, lambda: None


@right()
def a_constant_tensor_is_rebound():
    s = number(1.0)

    def change():
        nonlocal s
        s = number(4.0)

    return lambda x, t: s * x**2 - t, change


@right()
def a_tuple_is_rebound():
    pair = (1.0, 2.0)

    def change():
        nonlocal pair
        pair = (4.0, 5.0)

    return lambda x, t: pair[0] * x**2 - t, change


@right()
def a_variable_is_deleted():
    s = number(1.0)

    def change():
        nonlocal s
        del s

    return lambda x, t: s * x**2 - t, change


@right()
def tensors_of_a_list_are_swapped():
    items = [number(1.0), number(4.0)]
    return lambda x, t: items[0] * x**2 - t, items.reverse


@right()
def a_tensor_of_a_list_is_replaced():
    items = [number(1.0)]
    return lambda x, t: items[0] * x**2 - t, lambda: items.__setitem__(0, number(4.0))


@right()
def a_list_grows():
    items = [0.25, 0.75]
    return lambda x, t: sum(items) * x**2 - t, lambda: items.append(3.0)


@right()
def a_list_of_tensors_grows():
    items = [number(0.25), number(0.75)]
    return lambda x, t: torch.stack(items).sum() * x**2 - t, lambda: items.insert(0, number(3.0))


@right()
def a_list_is_emptied():
    items = [number(0.25), number(0.75)]
    return lambda x, t: sum(items) * x**2 - t, items.clear


@right()
def an_entry_is_replaced():
    options = {"s": number(1.0)}
    return lambda x, t: options["s"] * x**2 - t, lambda: options.update(s=number(4.0))


@right()
def an_entry_is_removed():
    options = {"s": 1.0}
    return lambda x, t: options.get("s", 4.0) * x**2 - t, options.clear


@right()
def an_entry_is_added():
    options = {"other": 0.0}
    return lambda x, t: options.get("s", 1.0) * x**2 - t, lambda: options.update(s=4.0)


@right()
def a_key_is_in_a_set():
    flags = {"large"}
    return lambda x, t: (4.0 if "small" in flags else 1.0) * x**2 - t, lambda: flags.add("small")


@right()
def an_attribute_is_annealed():
    owner = types.SimpleNamespace(s=1.0)
    return lambda x, t: owner.s * x**2 - t, lambda: setattr(owner, "s", 0.5 * owner.s)


@right()
def an_attribute_hides_that_of_the_class():
    class Options:
        s = 1.0

    owner = Options()
    return lambda x, t: owner.s * x**2 - t, lambda: setattr(owner, "s", 4.0)


@right()
def an_attribute_is_deleted():
    class Options:
        s = 4.0

    owner = Options()
    owner.s = 1.0
    return lambda x, t: owner.s * x**2 - t, lambda: delattr(owner, "s")


@right()
def an_index_selects_another_tensor_made_inside():
    i = 0

    def change():
        nonlocal i
        i = 1

    return lambda x, t: (x**2, 4 * x**2)[i] - t, change


@right_or_refused()
def an_index_of_c_selects_another_tensor_made_inside():
    indices = np.array([0])
    return lambda x, t: (x**2, 4 * x**2)[int(indices[0])] - t, lambda: indices.fill(1)


@right_or_refused()
def an_index_of_c_swaps_operands():
    """The operations are the same, of the same constants."""
    indices, a, b = np.array([0, 1]), number(4.0), number(1.0)
    return lambda x, t: (a, b)[indices[1]] * x**2 + 0 * (a, b)[indices[0]] - t, lambda: indices.fill(0)


# --- contents ---------------------------------------------------------------------------------------------------------


@right_or_refused(outside=True)
def a_constant_is_overwritten():
    s = number(1.0)
    return lambda x, t: s * x**2 - t, lambda: s.fill_(4.0)


@right_or_refused(outside=True)
def a_view_of_a_constant_is_overwritten():
    s = torch.ones(2, dtype=F64)
    return lambda x, t: s[0] * x**2 - t, lambda: s.fill_(4.0)


@right_or_refused()
def an_array_is_overwritten():
    values = np.array([1.0])
    return lambda x, t: torch.as_tensor(values)[0] * x**2 - t, lambda: values.fill(4.0)


@right_or_refused()
def numbers_of_an_array_are_overwritten():
    values = np.array([1.0])
    return lambda x, t: torch.tensor(values)[0] * x**2 - t, lambda: values.fill(4.0)


@right_or_refused(outside=True)
def a_step_of_an_optimizer():
    layer = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(layer.weight)

    def change():
        layer.weight.grad = torch.ones_like(layer.weight)
        torch.optim.SGD(layer.parameters(), lr=0.5).step()

    return lambda x, t: layer(x[None] ** 2)[0] - t, change


@right_or_refused(outside=True)
def the_data_of_a_parameter_are_replaced():
    weight = nn.Parameter(number(1.0))
    return lambda x, t: weight * x**2 - t, lambda: setattr(weight, "data", number(4.0))


# --- modules ----------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.temperature = 1.0
        self.register_buffer("scale", torch.ones((), dtype=F64))
        self.weight = nn.Parameter(torch.ones((), dtype=F64))
        self.layers = nn.ModuleList(layers)

    def forward(self, x, t):
        y = self.weight * self.scale * x**2 / self.temperature
        for layer in self.layers:
            y = layer(y)
        return y - t


class Scale(nn.Module):
    def __init__(self, s: float):
        super().__init__()
        self.s = s

    def forward(self, x):
        return self.s * x if self.training else x


@right()
def dropout_is_trained_again():
    model = Layer(nn.Dropout(0.5)).eval()
    return model, model.train


@right()
def a_layer_of_another_kind_is_trained_again():
    model = Layer(Scale(4.0)).eval()
    return model, model.train


@right(s=4.0)
def a_layer_is_evaluated():
    model = Layer(Scale(4.0))
    return model, model.eval


@right()
def normalisation_is_trained_again():
    norm = nn.BatchNorm1d(1, affine=False, eps=0.0).double().eval()
    return lambda x, t: norm(x[None, None] ** 2)[0, 0] - t, norm.train


@right()
def normalisation_was_trained_meanwhile():
    norm = nn.BatchNorm1d(1, affine=False, eps=0.0).double().eval()

    def change():  # the running averages are replaced, not overwritten
        norm.running_mean, norm.running_var = torch.ones_like(norm.running_mean), 4 * torch.ones_like(norm.running_var)

    return lambda x, t: norm(x[None, None] ** 2)[0, 0] - t, change


@right()
def a_temperature_is_annealed():
    model = Layer()
    return model, lambda: setattr(model, "temperature", 0.25)


@right()
def the_probability_of_dropout_is_annealed():
    dropout = nn.Dropout(0.0)
    return lambda x, t: dropout(x**2) / (1 - dropout.p) - t, lambda: setattr(dropout, "p", 0.75)


@right()
def a_buffer_is_replaced():
    model = Layer()
    return model, lambda: setattr(model, "scale", number(4.0))


@right()
def a_parameter_is_replaced():
    model = Layer()
    return model, lambda: setattr(model, "weight", nn.Parameter(number(4.0)))


@right(s=4.0)
def a_submodule_is_replaced():
    model = Layer(Scale(4.0))
    return model, lambda: model.layers.__setitem__(0, Scale(9.0))


@right(s=4.0)
def a_submodule_is_added():
    model = Layer(Scale(4.0))
    return model, lambda: model.layers.append(Scale(9.0))


@right(s=4.0)
def a_submodule_is_removed():
    model = Layer(Scale(4.0))
    return model, lambda: model.layers.pop(0)


@right(s=4.0)
def an_attribute_of_a_submodule():
    model = Layer(Scale(4.0))
    return model, lambda: setattr(model.layers[0], "s", 9.0)


# --- settings of torch ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """Puts back what the changes below set."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    deterministic, precision = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    benchmark = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.benchmark = benchmark


@right(s=torch.tensor(1 / 3, dtype=torch.float32).item())
def the_default_dtype_of_constants():
    return lambda x, t: torch.tensor(1 / 3).double() * x**2 - t, lambda: torch.set_default_dtype(F64)


@right()
def the_default_dtype_as_a_flag():
    return (
        lambda x, t: (1.0 if torch.get_default_dtype() is torch.float32 else 4.0) * x**2 - t,
        lambda: torch.set_default_dtype(F64),
    )


@right_or_refused()
def a_flag_of_a_backend():
    torch.backends.cudnn.benchmark = False
    return (
        lambda x, t: (4.0 if torch.backends.cudnn.benchmark else 1.0) * x**2 - t,
        lambda: setattr(torch.backends.cudnn, "benchmark", True),
    )


@right_or_refused()
def deterministic_algorithms():
    return (
        lambda x, t: (4.0 if torch.are_deterministic_algorithms_enabled() else 1.0) * x**2 - t,
        lambda: torch.use_deterministic_algorithms(True),
    )


@right_or_refused()
def the_precision_of_products():
    return (
        lambda x, t: (1.0 if torch.get_float32_matmul_precision() == "highest" else 4.0) * x**2 - t,
        lambda: torch.set_float32_matmul_precision("medium"),
    )


@right_or_refused()
def the_number_of_threads():
    torch.set_num_threads(1)
    return lambda x, t: float(torch.get_num_threads()) * x**2 - t, lambda: torch.set_num_threads(2)
