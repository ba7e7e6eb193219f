"""Low-rank layers in and out of live modules (LoRA, arXiv 2106.09685). Imports peft, as `lean_forward` does.

An adapted module computes `W x + strength * (alpha / rank) * lora_B(lora_A(x))`; adapters of several names
add up. Factors are float32 whatever the base's dtype. Nothing here reads or advances the global random state.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from lorabooth import rng
from lorabooth.adapters import formats, lean_forward, names, tree
from lorabooth.adapters.tree import Components, attached_names
from lorabooth.errors import AdapterError

_FLAG = "_hf_peft_config_loaded"  # by which diffusers and transformers know that a model carries adapters


@dataclass(frozen=True, slots=True)
class Target:
    """What to adapt in one component.

    Attributes:
        component: canonical component name.
        patterns: regular expressions, matched whole against canonical module paths; linear and 2-D
            convolution layers are adapted, other modules that match are passed over.
        rank: inner dimension, >= 1.
        alpha: numerator of the scale alpha / rank.
        dropout: on the adapter's input while its layer is in training mode, in [0, 1).
    """

    component: str
    patterns: tuple[str, ...]
    rank: int
    alpha: float
    dropout: float = 0.0


@dataclass(frozen=True)
class Attached:
    """An adapter that sits on live modules.

    Attributes:
        name: of the adapter.
        modules: canonical module name -> its adapted layer, in module order.
    """

    name: str
    modules: Mapping[str, nn.Module]

    def parameters(self, component: str | None = None) -> list[nn.Parameter]:
        """The factors (lora_A, lora_B of each module in order), of one component or of all."""
        return [
            weight
            for module, layer in self.modules.items()
            if component is None or names.split_module(module)[0] == component
            for weight in _factors(layer, self.name)
        ]

    def up_weights(self) -> list[nn.Parameter]:
        """The lora_B of every module: zero until the adapter has learned something."""
        return self.parameters()[1::2]

    @property
    def components(self) -> tuple[str, ...]:
        """Canonical names of the components that it sits on."""
        return tuple(dict.fromkeys(names.split_module(module)[0] for module in self.modules))

    @property
    def n_modules(self) -> int:
        """Number of adapted modules."""
        return len(self.modules)

    @property
    def n_parameters(self) -> int:
        """Number of trained numbers."""
        return sum(parameter.numel() for parameter in self.parameters())


@dataclass(frozen=True, slots=True)
class _Spec:
    """How one module is adapted."""

    rank: int
    alpha: float
    dropout: float


def attach(
    components: Components, targets: Sequence[Target], *, name: str = "default", seed: int
) -> Attached:
    """Put a fresh, trainable adapter on the modules that the targets match; the base is frozen.

    lora_A is Kaiming-uniform (bound 1/sqrt(fan_in), as in LoRA's reference code), a function of the seed and
    the module's canonical name only; lora_B is zero, so outputs are unchanged at first. A module that several
    targets match belongs to the first.

    Raises:
        AdapterError: a target matches nothing, its component is absent, or the name is taken.
    """
    plan: dict[str, dict[str, _Spec]] = {}
    for target in targets:
        adaptable = tree.adaptable(_component(components, target.component), target.component)
        expressions = [re.compile(pattern) for pattern in target.patterns]
        matched = [path for path in adaptable if any(e.fullmatch(path) for e in expressions)]
        if not matched:
            raise AdapterError(
                f"No linear or convolution layer of {target.component} matches {', '.join(target.patterns)}.",
                f"Its layers are called {tree.examples(adaptable)}.",
            )
        for path in matched:
            plan.setdefault(target.component, {}).setdefault(
                path, _Spec(target.rank, target.alpha, target.dropout)
            )
    attached = _inject(components, plan, name)
    with torch.no_grad():
        for module, layer in attached.modules.items():
            down, up = _factors(layer, name)
            _initialise(down, seed, module)
            up.zero_()
    for parameter in attached.parameters():
        parameter.requires_grad_(True)
    return attached


def attach_tensors(
    components: Components, tensors: Mapping[str, Tensor], *, strength: float = 1.0, name: str = "default"
) -> Attached:
    """Put a given adapter on the modules, frozen; ranks and alphas are the tensors'.

    Args:
        components: must hold every component that the tensors name.
        tensors: canonical.
        strength: factor on the adapter's effect.
        name: under which it is attached.

    Raises:
        AdapterError: incomplete tensors, modules that the components do not have or that are shaped
            otherwise, or the name is taken; nothing is changed then.
    """
    modules = formats.ranks_and_alphas(tensors)
    if not modules:
        raise AdapterError("The adapter holds no tensors.")
    plan: dict[str, dict[str, _Spec]] = {}
    strangers: list[str] = []
    known: dict[str, dict[str, nn.Module]] = {}
    ready = dict(tensors)
    for module, (rank, alpha) in modules.items():
        component, path = names.split_module(module)
        if component in components and component not in known:
            known[component] = tree.adaptable(components[component], component)
        base = known.get(component, {}).get(path)
        down, up = tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"]
        fitted = None if base is None else tree.fitted(base, down, up)
        if fitted is None:
            strangers.append(module)
            continue
        ready[f"{module}.lora_A"], ready[f"{module}.lora_B"] = fitted
        plan.setdefault(component, {})[path] = _Spec(rank, alpha, 0.0)
    if strangers:
        raise AdapterError(
            f"The adapter does not fit this base: {len(strangers)} of its {len(modules)} modules are absent "
            f"or have another shape: {tree.examples(strangers)}.",
            "It was made for another family of base models.",
        )
    attached = _inject(components, plan, name)
    write(components, name, ready)
    set_strength(components, name, strength)
    return attached


def tensors(components: Components, name: str = "default") -> dict[str, Tensor]:
    """Canonical tensors of an attached adapter: copies on the CPU, later steps do not change them.

    Returns:
        `<module>.lora_A` [r,in] or [r,in,k,k], `.lora_B` [out,r] or [out,r,1,1], `.alpha` [], float32.

    Raises:
        AdapterError: no such adapter is attached.
    """
    out: dict[str, Tensor] = {}
    for module, layer in tree.carrying(components, name).items():
        out[f"{module}.lora_A"] = layer.lora_A[name].weight.detach().to("cpu", copy=True)
        out[f"{module}.lora_B"] = layer.lora_B[name].weight.detach().to("cpu", copy=True)
        out[f"{module}.alpha"] = torch.tensor(float(layer.lora_alpha[name]), dtype=torch.float32)
    return out


def write(components: Components, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy canonical tensors into an attached adapter, alphas included; its strength stays.

    Raises:
        AdapterError: keys are missing or unexpected, or a shape differs; nothing is changed then.
    """
    layers = tree.carrying(components, name)
    expected = {f"{module}.{kind}" for module in layers for kind in names.KINDS}
    missing, unexpected = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
    misshapen = [
        f"{module}.{kind}"
        for module, layer in layers.items()
        for kind, held in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B))
        if f"{module}.{kind}" in tensors and tensors[f"{module}.{kind}"].shape != held[name].weight.shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if any(found.values()):
        what = "; ".join(f"{len(keys)} {kind}: {tree.examples(keys)}" for kind, keys in found.items() if keys)
        raise AdapterError(f"The tensors do not fit the adapter {name!r}: {what}.")
    alphas = {module: alpha for module, (_, alpha) in formats.ranks_and_alphas(tensors).items()}
    with torch.no_grad():
        for module, layer in layers.items():
            layer.lora_A[name].weight.copy_(tensors[f"{module}.lora_A"])
            layer.lora_B[name].weight.copy_(tensors[f"{module}.lora_B"])
            old, new = layer.lora_alpha[name], alphas[module]
            if new != old:
                strength = layer.scaling[name] * layer.r[name] / old if old else 1.0
                layer.lora_alpha[name] = new
                layer.scaling[name] = strength * new / layer.r[name]


def set_strength(components: Components, name: str, strength: float) -> None:
    """Scale an adapter's effect: 0 is off, 1 as trained.

    Raises:
        AdapterError: no such adapter is attached.
    """
    for layer in tree.carrying(components, name).values():
        layer.set_scale(name, strength)


@contextmanager
def disabled(components: Components) -> Iterator[None]:
    """Switch all adapters off; afterwards (exceptions included) everything is exactly as it was."""
    layers = [x for component, model in components.items() for x in tree.adapted(model, component).values()]
    before = [(layer, layer.disable_adapters, tree.gradients(layer)) for layer in layers]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, was_off, gradients in before:
            layer.enable_adapters(not was_off)
            tree.restore_gradients(gradients)


def detach(components: Components, name: str = "default") -> None:
    """Remove an adapter without a trace: module tree and weights are as if it had never been attached.

    Raises:
        AdapterError: no such adapter is attached.
    """
    tree.carrying(components, name)
    for component, model in components.items():
        for path, _, layer in list(tree.walk(model, component)):
            if not tree.is_adapted(layer) or name not in layer.lora_A:
                continue
            if set(layer.lora_A) == {name}:
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, layer.get_base_layer())
                continue
            active = [other for other in layer.active_adapters if other != name]
            gradients = tree.gradients(layer)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # on what becomes active: set below
                layer.delete_adapter(name)
            layer.set_adapter(active)
            tree.restore_gradients(gradients)
        _forget(model, name)


def _inject(components: Components, plan: Mapping[str, Mapping[str, _Spec]], name: str) -> Attached:
    """Let peft replace the planned modules; factors are float32, frozen, their values the caller's."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise AdapterError(f"An adapter's name is made of letters, digits, '_' and '-', not {name!r}.")
    if name in attached_names(components):
        raise AdapterError(
            f"An adapter {name!r} is attached already.", "Detach it first, or give another name."
        )
    modules: dict[str, nn.Module] = {}
    for component, specs in plan.items():
        model = components[component]
        existing = tree.adapted(model, component)
        before = [(layer, list(layer.active_adapters), tree.gradients(layer)) for layer in existing.values()]
        _inject_one(model, component, specs, name)
        for layer, active, gradients in before:
            layer.set_adapter([*active, name] if name in layer.lora_A else active)
            tree.restore_gradients(gradients)
        for path, layer in tree.adapted(model, component, name).items():
            # By version peft leaves factors in the base's dtype; new layers are in training mode.
            layer.lora_A[name].to(torch.float32).requires_grad_(False)
            layer.lora_B[name].to(torch.float32).requires_grad_(False)
            layer.lora_dropout[name] = (
                nn.Dropout(specs[path].dropout) if specs[path].dropout else nn.Identity()
            )
            layer.train(layer.get_base_layer().training)
            modules[f"{component}.{path}"] = layer
        lean_forward.make_lean(model, name)
    return Attached(name, modules)


def _inject_one(model: nn.Module, component: str, specs: Mapping[str, _Spec], name: str) -> None:
    own = {canonical: path for path, canonical, _ in tree.walk(model, component)}
    by_rank: dict[int, list[str]] = {}
    by_alpha: dict[float, list[str]] = {}
    for path, spec in specs.items():
        by_rank.setdefault(spec.rank, []).append(own[path])
        by_alpha.setdefault(spec.alpha, []).append(own[path])
    rank = Counter(spec.rank for spec in specs.values()).most_common(1)[0][0]
    alpha = Counter(spec.alpha for spec in specs.values()).most_common(1)[0][0]
    # One expression of whole names: peft matches lists by their endings, which may catch more.
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=tree.any_of(own[path] for path in specs),
        rank_pattern={f"^{tree.any_of(paths)}": r for r, paths in by_rank.items() if r != rank},
        alpha_pattern={f"^{tree.any_of(paths)}": a for a, paths in by_alpha.items() if a != alpha},
        init_lora_weights=False,
    )
    loaded = vars(model).get(_FLAG)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(config, model, adapter_name=name)
    if hasattr(model, _FLAG) and not loaded:
        setattr(model, _FLAG, True)


def _forget(model: nn.Module, name: str) -> None:
    """Take a removed adapter out of the model's own list."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return
    configs.pop(name, None)
    if not configs:
        del model.peft_config
        if _FLAG in vars(model):
            delattr(model, _FLAG)


def _factors(layer: Any, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """(lora_A, lora_B) of one adapter of a layer."""
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _initialise(weight: Tensor, seed: int, module: str) -> None:
    """Kaiming uniform with a = sqrt(5): U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    if weight.is_meta:
        return
    bound = 1 / math.sqrt(weight[0].numel())
    generator = rng.generator_for(seed, 0, 0, f"lora_A/{module}")
    weight.copy_((torch.rand(weight.shape, generator=generator, dtype=torch.float32) * 2 - 1) * bound)


def _component(components: Components, component: str) -> nn.Module:
    if component not in components:
        raise AdapterError(f"The base has no {component!r} to adapt (it has {', '.join(components)}).")
    return components[component]
