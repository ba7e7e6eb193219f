"""Attaching, reading, writing, switching off and removing adapters on real modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lorabooth.adapters import inject
from lorabooth.adapters.inject import Target
from lorabooth.errors import AdapterError
from tests.adapters.conftest import ATTENTION, EVERYTHING, TEXT, difference, outputs


def snapshot(components):
    return {
        name: (
            [(path, type(module)) for path, module in model.named_modules()],
            {key: value.clone() for key, value in model.state_dict().items()},
            {key: p.requires_grad for key, p in model.named_parameters()},
            sorted(vars(model)),
        )
        for name, model in components.items()
    }


def assert_same(before, after):
    for name in before:
        tree, weights, gradients, attributes = before[name]
        assert after[name][0] == tree
        assert after[name][1].keys() == weights.keys()
        assert all(torch.equal(after[name][1][key], weights[key]) for key in weights)
        assert after[name][2] == gradients
        assert after[name][3] == attributes


def by_hand(components, tensors, strength=1.0):
    """W + strength * alpha / rank * up @ down, in float64, convolutions flattened: kohya's published rule."""
    merged = copy.deepcopy(components)
    flat = not hasattr(merged["text_encoder"], "text_model")
    for module in {key.rpartition(".")[0] for key in tensors}:
        component, _, path = module.partition(".")
        layer = merged[component].get_submodule(path.removeprefix("text_model.") if flat else path)
        down, up = tensors[f"{module}.lora_A"].double(), tensors[f"{module}.lora_B"].double()
        scale = strength * float(tensors[f"{module}.alpha"]) / down.shape[0]
        delta = (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)
        layer.weight.data = (layer.weight.double() + scale * delta).float()
    return merged


def test_fresh_adapter_changes_nothing_and_is_a_function_of_the_seed(sd1):
    components = sd1.load()
    before = outputs(components)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    targets = [Target("denoiser", EVERYTHING, 4, 4.0), Target("text_encoder", (TEXT,), 2, 2.0)]
    attached = inject.attach(components, targets, seed=7)
    assert torch.equal(torch.get_rng_state(), state), "global random state was read"
    assert all(torch.equal(a, b) for a, b in zip(outputs(components), before, strict=True))
    first = inject.tensors(components)

    torch.manual_seed(2)
    again = sd1.load()
    # another selection of modules must not shift the numbers of the rest
    inject.attach(again, [Target("denoiser", (ATTENTION,), 4, 4.0)], seed=7)
    second = inject.tensors(again)
    assert second.keys() < first.keys()
    assert all(torch.equal(first[key], second[key]) for key in second)

    other = sd1.load()
    inject.attach(other, [Target("denoiser", (ATTENTION,), 4, 4.0)], seed=8)
    key = next(key for key in second if key.endswith("lora_A"))
    assert not torch.equal(inject.tensors(other)[key], second[key])

    down = first["denoiser.conv_in.lora_A"]
    bound = (4 * 9) ** -0.5
    assert down.abs().max() <= bound
    assert down.abs().max() > 0.8 * bound
    assert attached.n_modules * 3 == len(first)
    assert attached.components == ("denoiser", "text_encoder")


def test_tensor_names_and_shapes(sd1):
    components = sd1.load()
    inject.attach(
        components, [Target("denoiser", EVERYTHING, 3, 6.0), Target("text_encoder", (TEXT,), 2, 1.0)], seed=0
    )
    got = inject.tensors(components)
    to_q = "denoiser.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    assert got[f"{to_q}.lora_A"].shape == (3, 32)
    assert got[f"{to_q}.lora_B"].shape == (32, 3)
    assert got[f"{to_q}.alpha"].shape == ()
    assert float(got[f"{to_q}.alpha"]) == 6.0
    assert got["denoiser.conv_in.lora_A"].shape == (3, 4, 3, 3)
    assert got["denoiser.conv_in.lora_B"].shape == (32, 3, 1, 1)
    assert got["text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A"].shape == (2, 32)
    assert all(t.dtype == torch.float32 for t in got.values())


def test_only_the_adapter_trains(sd1):
    components = sd1.load()
    components["denoiser"].requires_grad_(True)
    attached = inject.attach(components, [Target("denoiser", (ATTENTION,), 4, 4.0)], seed=0)
    ours = {id(p) for p in attached.parameters()}
    trained = {id(p) for p in components["denoiser"].parameters() if p.requires_grad}
    assert trained == ours
    assert attached.n_parameters == sum(p.numel() for p in attached.parameters("denoiser"))
    assert attached.parameters("text_encoder") == []


def test_equals_kohyas_rule_by_hand(base, trained):
    components, plain = base.load(), base.load()
    tensors = trained(components)
    live, hand = outputs(components), outputs(by_hand(plain, tensors))
    assert difference(live[0], hand[0]) < 1e-5
    assert difference(live[1], hand[1]) < 1e-5
    assert difference(live[0], outputs(plain)[0]) > 1e-2
    assert difference(live[1], outputs(plain)[1]) > 1e-2


def test_text_encoder_with_and_without_the_prefix(sd1, trained):
    """transformers before 5 nests the encoder in `text_model`; files are the same for both trees."""

    class Nested(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.text_model = inner

        def forward(self, ids):
            return self.text_model(ids)

    components = sd1.load()
    tensors = trained(components)
    expected = outputs(components)
    other = sd1.load()
    if hasattr(other["text_encoder"], "text_model"):
        other["text_encoder"] = other["text_encoder"].text_model
    else:
        other["text_encoder"] = Nested(other["text_encoder"])
    inject.attach_tensors(other, tensors)
    assert all(torch.equal(a, b) for a, b in zip(outputs(other), expected, strict=True))
    assert inject.tensors(other).keys() == tensors.keys()


def test_attach_tensors_round_trip_with_mixed_ranks_and_alphas(base, trained):
    components = base.load()
    tensors = trained(components, rank=4)
    # every third module of the denoiser gets another rank, every fourth another alpha
    modules = sorted({key.rpartition(".")[0] for key in tensors if key.startswith("denoiser.")})
    for i, module in enumerate(modules):
        if i % 3 == 0:
            tensors[f"{module}.lora_A"] = tensors[f"{module}.lora_A"][: 1 + i % 2].clone()
            tensors[f"{module}.lora_B"] = tensors[f"{module}.lora_B"][:, : 1 + i % 2].clone()
        if i % 4 == 0:
            tensors[f"{module}.alpha"] = torch.tensor(0.5 + i % 3)
    other = base.load()
    attached = inject.attach_tensors(other, tensors, name="mixed", strength=0.7)
    got = inject.tensors(other, "mixed")
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[key], tensors[key]) for key in got)
    assert not any(p.requires_grad for p in attached.parameters())
    hand = outputs(by_hand(base.load(), tensors, strength=0.7))
    live = outputs(other)
    assert difference(live[0], hand[0]) < 1e-5
    assert difference(live[1], hand[1]) < 1e-5


def test_several_adapters_add_up(sd1, trained):
    one = trained(sd1.load(), seed=1)
    two = trained(sd1.load(), patterns=(ATTENTION,), rank=2, seed=2)
    components = sd1.load()
    inject.attach_tensors(components, one, name="one")
    alone = outputs(components)
    inject.attach_tensors(components, two, name="two", strength=0.5)
    assert inject.attached_names(components) == ("one", "two")
    hand = outputs(by_hand(by_hand(sd1.load(), one), two, strength=0.5))
    live = outputs(components)
    assert difference(live[0], hand[0]) < 1e-5
    assert difference(live[1], hand[1]) < 1e-5
    inject.set_strength(components, "two", 0.0)
    assert difference(outputs(components)[0], alone[0]) < 1e-6
    inject.set_strength(components, "two", 1.0)
    inject.detach(components, "two")
    assert inject.attached_names(components) == ("one",)
    assert all(torch.equal(a, b) for a, b in zip(outputs(components), alone, strict=True))
    assert all(
        torch.equal(a, b)
        for a, b in zip(inject.tensors(components, "one").values(), one.values(), strict=True)
    )


def test_second_adapter_leaves_the_first_trainable(sd1, trained):
    components = sd1.load()
    first = inject.attach(components, [Target("denoiser", (ATTENTION,), 4, 4.0)], name="learn", seed=0)
    second = inject.attach_tensors(components, trained(sd1.load()), name="style")
    assert all(p.requires_grad for p in first.parameters())
    assert not any(p.requires_grad for p in second.parameters())
    with inject.disabled(components):
        pass
    assert all(p.requires_grad for p in first.parameters())
    assert not any(p.requires_grad for p in second.parameters())
    inject.detach(components, "style")
    assert all(p.requires_grad for p in first.parameters())


def test_detach_leaves_no_trace(base, trained):
    components = base.load()
    before = snapshot(components)
    results = outputs(components)
    trained(components)
    trained(components, patterns=(ATTENTION,), name="second")
    inject.detach(components, "default")
    inject.detach(components, "second")
    assert_same(before, snapshot(components))
    assert all(torch.equal(a, b) for a, b in zip(outputs(components), results, strict=True))
    assert inject.attached_names(components) == ()
    with pytest.raises(AdapterError, match="default"):
        inject.detach(components, "default")
    trained(components)  # and it can be attached again


def test_disabled_is_the_base_and_restores(sd1, trained):
    components = sd1.load()
    plain = outputs(components)
    trained(components)
    inject.set_strength(components, "default", 0.3)
    adapted = outputs(components)
    before = snapshot(components)
    with inject.disabled(components):
        assert all(torch.equal(a, b) for a, b in zip(outputs(components), plain, strict=True))
        with inject.disabled(components):
            pass
        assert torch.equal(outputs(components)[0], plain[0])
    assert all(torch.equal(a, b) for a, b in zip(outputs(components), adapted, strict=True))
    assert_same(before, snapshot(components))

    def fail():
        with inject.disabled(components):
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        fail()
    assert_same(before, snapshot(components))
    assert torch.equal(outputs(components)[0], adapted[0])


def test_gradients_flow_after_a_disabled_pass(sd1):
    """Distillation runs the base between the adapted forward and its backward."""
    components = {"denoiser": sd1.load()["denoiser"]}
    attached = inject.attach(components, [Target("denoiser", (ATTENTION,), 4, 4.0)], seed=0)
    x, cond = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 32)
    out = components["denoiser"](x, 5, cond).sample
    with inject.disabled(components), torch.no_grad():
        teacher = components["denoiser"](x + 1, 5, cond).sample
    (out - teacher).pow(2).mean().backward()
    ups = attached.parameters()[1::2]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in ups)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_base_with_float32_adapter(sd1, autocast, trained):
    components = sd1.load()
    for model in components.values():
        model.to(torch.bfloat16)
    tensors = trained(components)
    assert all(t.dtype == torch.float32 for t in tensors.values())
    attached = inject.attach(components, [Target("denoiser", (ATTENTION,), 2, 2.0)], name="b", seed=3)
    assert all(p.dtype == torch.float32 for p in attached.parameters())
    assert attached.parameters()[0].unique().numel() > 0.9 * attached.parameters()[0].numel()  # not rounded
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        noise, states = outputs(components, torch.bfloat16)
    assert noise.dtype == torch.bfloat16
    reference = sd1.load()
    inject.attach_tensors(reference, tensors)
    assert difference(noise.float(), outputs(reference)[0]) < 0.1
    assert difference(states.float(), outputs(reference)[1]) < 0.1


def test_dropout_only_in_training_mode(sd1):
    components = {"denoiser": sd1.load()["denoiser"]}
    attached = inject.attach(components, [Target("denoiser", (ATTENTION,), 4, 4.0, dropout=0.5)], seed=0)
    with torch.no_grad():
        for weight in attached.parameters()[1::2]:
            weight.fill_(0.1)
    x, cond = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 32)

    def run():
        with torch.no_grad():
            return components["denoiser"](x, 5, cond).sample

    assert torch.equal(run(), run())
    components["denoiser"].train()
    assert not torch.equal(run(), run())


def test_write_is_strict(sd1, trained):
    components = sd1.load()
    tensors = trained(components)
    before = {k: v.clone() for k, v in tensors.items()}
    key = next(k for k in tensors if k.endswith("to_q.lora_B"))

    def refused(changed, word):
        with pytest.raises(AdapterError, match=word) as caught:
            inject.write(components, "default", changed)
        assert key.rpartition(".")[0] in str(caught.value)
        now = inject.tensors(components)
        assert all(torch.equal(now[k], before[k]) for k in before)

    refused({k: v for k, v in tensors.items() if k != key}, "missing")
    refused({**tensors, key.replace("to_q", "to_qq"): tensors[key]}, "unexpected")
    refused({**tensors, key: tensors[key][:, :1]}, "another shape")
    zeros = {k: v if k.endswith("alpha") else torch.zeros_like(v) for k, v in tensors.items()}
    inject.write(components, "default", zeros)
    assert all(torch.equal(v, zeros[k]) for k, v in inject.tensors(components).items())
    assert torch.equal(outputs(components)[0], outputs(sd1.load())[0])


def test_a_1x1_convolution_and_a_linear_layer_take_each_others_factors(base, trained):
    """Kohya's SD2 files may hold proj_in as a convolution."""
    tensors = trained(base.load(), patterns=(r".*\.proj_(in|out)",), text=False)
    turned = {
        k: v if k.endswith("alpha") else v.flatten(1) if v.dim() == 4 else v[:, :, None, None]
        for k, v in tensors.items()
    }
    ours, theirs = base.load(), base.load()
    inject.attach_tensors(ours, tensors)
    inject.attach_tensors(theirs, turned)
    assert torch.equal(outputs(ours)[0], outputs(theirs)[0])
    assert not torch.equal(outputs(ours)[0], outputs(base.load())[0])


def test_what_does_not_fit_is_refused_and_changes_nothing(sd1, trained):
    components = sd1.load()
    before = snapshot(components)
    tensors = trained(sd1.load())
    with pytest.raises(AdapterError, match="text_encoder"):
        inject.attach_tensors({"denoiser": components["denoiser"]}, tensors)
    stranger = {k.replace("down_blocks.0", "down_blocks.9"): v for k, v in tensors.items()}
    with pytest.raises(AdapterError, match=r"down_blocks\.9"):
        inject.attach_tensors(components, stranger)
    narrow = {k: v[:, :-1] if k.endswith("proj_in.lora_A") else v for k, v in tensors.items()}
    with pytest.raises(AdapterError, match=r"another shape.*proj_in"):
        inject.attach_tensors(components, narrow)
    with pytest.raises(AdapterError, match="no alpha"):
        inject.attach_tensors(components, {k: v for k, v in tensors.items() if not k.endswith("alpha")})
    with pytest.raises(AdapterError, match=r"nothing_like_this.*\n.*conv_in"):
        inject.attach(components, [Target("denoiser", ("nothing_like_this",), 4, 4.0)], seed=0)
    with pytest.raises(AdapterError, match="text_encoder_2"):
        inject.attach(components, [Target("text_encoder_2", (TEXT,), 4, 4.0)], seed=0)
    with pytest.raises(AdapterError, match="ghost"):
        inject.set_strength(components, "ghost", 1.0)
    assert_same(before, snapshot(components))
    inject.attach_tensors(components, tensors)
    with pytest.raises(AdapterError, match="already"):
        inject.attach_tensors(components, tensors)


def test_attach_on_meta_modules(sd1):
    """The memory meter attaches to modules without storage."""
    model = sd1.load()["denoiser"].to("meta")
    attached = inject.attach({"denoiser": model}, [Target("denoiser", EVERYTHING, 4, 4.0)], seed=0)
    assert all(p.is_meta and p.requires_grad for p in attached.parameters())
