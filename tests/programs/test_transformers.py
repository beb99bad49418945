"""MAML whose inner model is a small random transformer of Hugging Face's transformers."""

from __future__ import annotations

import pytest
import torch
from checks.differences import central
from torch.func import functional_call, grad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from implicitdiff import MetaSGD, extract_state_dict, recover_state_dict, unroll

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

generator = torch.Generator().manual_seed(0)
SUPPORT, QUERY = torch.randint(7, (2, 3, 5), generator=generator)
WITHOUT_DROPOUT = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)
TOKENS = {"vocab_size": 7, "bos_token_id": 0, "eos_token_id": 0}


def gpt2(**options):
    config = transformers.GPT2Config(
        n_positions=5, n_embd=8, n_layer=1, n_head=2, **TOKENS, **WITHOUT_DROPOUT, **options
    )
    return transformers.GPT2LMHeadModel(config)


def bert(**options):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(max_position_embeddings=5, pad_token_id=None, **sizes, **TOKENS, **options)
    return transformers.BertForMaskedLM(config)


def loss(logits, tokens):
    return cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def by_functions(net, start):
    """The loss after two steps, as a function of where they begin."""

    def value(params, tokens):
        return loss(functional_call(net, params, (tokens,)).logits, tokens)

    def step(params):
        return {k: params[k] - 0.5 * g for k, g in grad(value)(params, SUPPORT).items()}

    return value(unroll(step, 2)(start), QUERY)


def by_objects(net, start):
    net.load_state_dict(start, strict=False)
    inner, before = MetaSGD(net, lr=0.5), extract_state_dict(net)
    with sdpa_kernel(SDPBackend.MATH):  # torch's fused attention has no second derivative on the CPU
        for _ in range(2):
            inner.step(loss(net(SUPPORT).logits, SUPPORT))
    after = loss(net(QUERY).logits, QUERY)
    recover_state_dict(net, before)
    return after


def of_functions(net, start):
    return grad(lambda params: by_functions(net, params))(start)


def of_objects(net, start):
    by_objects(net, start).backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


@pytest.mark.parametrize(("adapted", "derivative"), [(by_functions, of_functions), (by_objects, of_objects)])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [gpt2, bert])
def test_meta_gradients_are_central_differences(make, attention, adapted, derivative):
    torch.manual_seed(0)
    net = make(attn_implementation=attention).double().eval()
    start = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    direction = {name: torch.randn(value.shape, dtype=value.dtype) for name, value in start.items()}

    def along(s):
        return adapted(net, {name: value + s * direction[name] for name, value in start.items()})

    expected = central(along, torch.tensor(0.0, dtype=torch.float64), h=1e-6)
    found = derivative(net, start)
    torch.testing.assert_close(sum((found[k] * direction[k]).sum() for k in found), expected, rtol=1e-6, atol=1e-8)
