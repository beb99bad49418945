"""The recipes in docs/recipes.md that need another library: each block runs, and its derivatives are checked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checks.differences import central

from implicitdiff import NotARootError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"


def blocks() -> dict[str, str]:
    """The code of each ```python block, by the heading of its section."""
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    found = {
        section.partition("\n")[0]: re.findall(r"^```python\n(.*?)^```", section, re.S | re.M) for section in sections
    }
    return {heading: code for heading, (code,) in ((heading, codes) for heading, codes in found.items() if codes)}


def run(heading: str, **replaced: str) -> dict[str, Any]:
    code = blocks()[heading]
    for old, new in replaced.items():
        assert old in code
        code = code.replace(old, new)
    names: dict[str, Any] = {"__name__": "recipe"}
    exec(compile(code, f"{PAGE.name}: {heading}", "exec"), names)
    return names


def test_every_block_has_a_test():
    assert set(blocks()) == {SCIKIT_LEARN, LIGHTNING, GPYTORCH}


SCIKIT_LEARN = "A scikit-learn estimator"


def test_a_scikit_learn_estimator_has_the_derivatives_of_refitting():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    recipe = run(SCIKIT_LEARN)
    penalty, *data = (recipe[name] for name in ("penalty", "X", "y", "X_new", "y_new"))
    X, *others = data
    in_penalty = central(lambda penalty: recipe["held_out_loss"](penalty, *data), penalty)
    in_data = central(lambda rows: recipe["held_out_loss"](penalty, torch.cat([rows, X[4:]]), *others), X[:4])
    assert in_penalty.abs() > 1e-2
    torch.testing.assert_close(recipe["in_penalty"], in_penalty, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(recipe["in_data"][:4], in_data, rtol=1e-6, atol=1e-8)


def test_a_scikit_learn_estimator_with_its_default_tolerance_fails_the_check():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    with pytest.raises(NotARootError):
        run(SCIKIT_LEARN, **{"tol=1e-12, ": ""})


LIGHTNING = "A Lightning module"


@pytest.mark.filterwarnings("default")  # Lightning's, of what it could do faster
def test_a_lightning_module_learns_as_one_of_unrolled_iterations(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")
    generator = torch.Generator().manual_seed(0)
    batches = [tuple(torch.randn(6, n, dtype=torch.float64, generator=generator) for n in (4, 1)) for _ in range(5)]
    torch.manual_seed(0)
    module = run(LIGHTNING)["Equilibrium"]().double()
    expected = {name: p.detach().clone() for name, p in module.named_parameters()}
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=2, default_root_dir=tmp_path, **quiet)
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer.fit(module, loader, torch.utils.data.DataLoader(batches[:1], batch_size=None))

    def error(parameters, x, y):
        def linear(name, x):
            return x @ parameters[f"{name}.weight"].T + parameters[f"{name}.bias"]

        x = linear("encoder", x)
        z = torch.zeros_like(x)
        for _ in range(200):
            z = torch.tanh(linear("inner", z) + x)
        return ((linear("readout", z) - y) ** 2).mean()

    start = expected
    for x, y in batches * 2:
        slopes = torch.func.grad(error)(expected, x, y)
        expected = {name: p - 0.1 * slopes[name] for name, p in expected.items()}
    assert (expected["inner.weight"] - start["inner.weight"]).norm() > 1e-3
    torch.testing.assert_close({n: p.detach() for n, p in module.named_parameters()}, expected, rtol=1e-7, atol=1e-9)
    found = trainer.callback_metrics["error"]
    torch.testing.assert_close(found.double(), error(expected, *batches[0]), rtol=1e-6, atol=1e-8)


GPYTORCH = "GPyTorch hyper-parameters"


def test_gpytorch_hyper_parameters_have_the_derivatives_of_fitting_again():
    pytest.importorskip("gpytorch", reason="GPyTorch is not installed")
    recipe = run(GPYTORCH)
    y, precision = recipe["y"], torch.tensor(0.01, dtype=torch.float64)
    direction = torch.sin(torch.arange(12.0, dtype=torch.float64))
    at_zero = torch.tensor(0.0, dtype=torch.float64)
    along = central(lambda t: recipe["held_out_error"](y + t * direction, precision), at_zero)
    in_precision = central(lambda precision: recipe["held_out_error"](y, precision), precision)
    assert in_precision.abs() > 1e-3
    torch.testing.assert_close(recipe["in_targets"] @ direction, along, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(recipe["in_precision"], in_precision, rtol=1e-6, atol=1e-8)


def test_the_evidence_of_the_gpytorch_recipe_is_that_of_a_normal_distribution():
    pytest.importorskip("gpytorch", reason="GPyTorch is not installed")
    recipe = run(GPYTORCH)
    X, y = recipe["X"], recipe["y"]
    raw = {name.removeprefix("model."): torch.nn.functional.softplus(p) for name, p in recipe["start"].items()}
    apart = (X[:, None] - X) / raw["kernel.base_kernel.raw_lengthscale"]
    matrix = raw["kernel.raw_outputscale"] * torch.exp(-(apart**2).sum(-1) / 2)
    noise = raw["likelihood.noise_covar.raw_noise"] + 1e-4  # GPyTorch's lower bound
    normal = torch.distributions.MultivariateNormal(torch.zeros_like(y), matrix + noise * torch.eye(len(y)).double())
    found = -recipe["objective"](recipe["start"], y, 0.0)
    torch.testing.assert_close(found, normal.log_prob(y) / len(y), rtol=1e-6, atol=1e-8)
