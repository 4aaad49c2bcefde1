"""Experts: a mixture of experts as linears one by one, whatever a file or transformers fuses.

transformers holds all experts of a decoder layer in two tensors. Here gate, up and down of each
expert are an nn.Linear, called as the family's files call it, such as `mlp.experts.7.gate_proj` or
`block_sparse_moe.experts.7.w1`, and together they compute what transformers' eager path computes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gblm.errors import CheckpointError
from gblm.model.reader import Cut, Reader

# What gate, up and down are called where transformers does not say how a family's files do.
NAMES = ("gate_proj", "up_proj", "down_proj")
FUSED = ("gate_up_proj", "down_proj")
# No model has more; a config that claims absurdly many is refused before they are built.
MOST_EXPERTS = 4096


class Expert(nn.Module):
    """An expert is a gated MLP of three linears.

    Attributes:
        names: of gate, up and down.
        routing: the weights [tokens] by which its last outputs counted; None where its inputs were
            weighted before.
    """

    def __init__(
        self, names: Sequence[str], weights: Sequence[Tensor], act_fn: Callable[[Tensor], Tensor]
    ) -> None:
        """Take gate [inner, hidden], up and down [hidden, inner]; none of them is copied."""
        super().__init__()
        self.names, self.act_fn = tuple(names), act_fn
        self.routing: Tensor | None = None
        for name, weight in zip(names, weights, strict=True):
            with torch.device("meta"):
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            # data, not detach(): training changes one weight while another's gradient is taken.
            linear.weight = nn.Parameter(weight.data, requires_grad=weight.requires_grad)
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        """Run tokens [tokens, hidden] through the three linears."""
        gate, up, down = (self.get_submodule(name) for name in self.names)
        out: Tensor = down(self.act_fn(gate(x)) * up(x))
        return out


class Experts(nn.ModuleList):
    """All experts of a decoder layer, in the place of transformers' fused module.

    Attributes:
        source: what transformers calls that module.
        cuts: where each weight lies in the fused tensors, by its name within this module.
        fused: what the family's files call the fused tensors, by transformers' names; empty where
            they hold experts one by one.
        every: whether experts without tokens run, too, so that all have gradients.
        grouped: runs all experts in one call where their packed linears allow it; else None.
    """

    columns_first = False
    """Whether the fused tensors are [experts, in, out]."""

    def __init__(self, fused: Any, names: Sequence[str], source: str) -> None:
        """Take the fused module apart; the linears' weights are views of its weights."""
        super().__init__()
        self.source = source
        self.cuts: dict[str, Cut] = {}
        self.fused: dict[str, str] = {}
        self.every = False
        self.grouped: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
        for index in range(len(fused.down_proj)):
            cuts = list(self._cuts(fused, index))
            wholes = (fused.gate_up_proj, fused.gate_up_proj, fused.down_proj)
            weights = [cut.take(whole) for cut, whole in zip(cuts, wholes, strict=True)]
            self.append(Expert(names, weights, fused.act_fn))
            for name, cut in zip(names, cuts, strict=True):
                self.cuts[f"{index}.{name}.weight"] = cut

    def _cuts(self, fused: Any, index: int) -> Iterator[Cut]:
        """Say where gate, up and down of an expert lie."""
        gate_up, down = (tuple(getattr(fused, name).shape) for name in FUSED)
        inner, own = down[1 if self.columns_first else 2], slice(index, index + 1)
        for half in (slice(0, inner), slice(inner, 2 * inner)):
            place = (own, slice(None), half) if self.columns_first else (own, half)
            yield Cut(f"{self.source}.{FUSED[0]}", gate_up, place, self.columns_first)
        yield Cut(f"{self.source}.{FUSED[1]}", down, (own,), self.columns_first)

    def forward(self, hidden_states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Add up what the chosen experts make of each token.

        Args:
            hidden_states: [tokens, hidden].
            chosen: [tokens, experts of a token], their indices.
            weights: of the same shape, how much each counts.

        Returns:
            [tokens, hidden], added expert by expert in the dtype of the hidden states.
        """
        if self.grouped is not None:
            return self.grouped(hidden_states, chosen, weights)
        total = torch.zeros_like(hidden_states)
        for index in range(len(self)) if self.every else chosen.unique().tolist():
            place, token = torch.where(chosen.t() == index)
            expert: Any = self[index]
            expert.routing = weights[token, place].detach()
            out = expert(hidden_states[token]) * weights[token, place, None]
            total.index_add_(0, token, out.to(total.dtype))
        return total


class WeightedExperts(Experts):
    """Llama 4 hands each expert all tokens, weighted before, with zeros for those not chosen."""

    columns_first = True

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """Run [experts · tokens, hidden]; tokens of zeros are left out, for they stay zeros."""
        if self.grouped is not None:
            own = torch.arange(len(self)).repeat_interleave(len(hidden_states) // len(self))
            chosen = own.where((hidden_states != 0).any(-1), -1)[:, None]
            return self.grouped(hidden_states, chosen, torch.ones(chosen.shape))
        outs = []
        for expert, own in zip(self, hidden_states.chunk(len(self)), strict=True):
            (token,) = torch.where((own != 0).any(-1))
            out = torch.zeros_like(own)
            runs = self.every or len(token) > 0
            outs.append(out.index_copy(0, token, expert(own[token])) if runs else out)
        return torch.cat(outs)


class ExpertLinear(NamedTuple):
    """An ExpertLinear says of a linear which expert it belongs to.

    Attributes:
        block: local name of its Experts.
        number: of its expert.
        role: its own name, such as "up_proj".
        stage: 0 for gate and up, 1 for down, which takes what they make.
        input: local name of the first linear with the same input: gate, or down itself.
    """

    block: str
    number: int
    role: str
    stage: int
    input: str

    @property
    def expert(self) -> str:
        """Name the expert."""
        return f"{self.block}.{self.number}"


def expert_linears(layer: nn.Module) -> dict[str, ExpertLinear]:
    """Find the experts' linears of a module, by local name, in order."""
    found: dict[str, ExpertLinear] = {}
    for block, experts in blocks(layer):
        for index, expert in enumerate(experts):
            gate, up, down = expert.names
            for stage, role, first in ((0, gate, gate), (0, up, gate), (1, down, down)):
                own, leader = (f"{block}.{index}.{name}" for name in (role, first))
                found[own] = ExpertLinear(block, index, role, stage, leader)
    return found


def blocks(module: nn.Module) -> list[tuple[str, Any]]:
    """Find all Experts within a module, and what it calls them."""
    return [(name, part) for name, part in module.named_modules() if isinstance(part, Experts)]


def routers(layer: nn.Module) -> set[nn.Module]:
    """Find what chooses and weighs experts, which is never pruned.

    It stands beside them and has at most one linear; shared experts have more.
    """
    found: set[nn.Module] = set()
    for block in layer.modules():
        if any(isinstance(child, Experts) for child in block.children()):
            for child in block.children():
                linears = sum(isinstance(part, nn.Linear) for part in child.modules())
                if not isinstance(child, Experts) and linears < 2:
                    found |= set(child.modules())
    return found


def are_named(config: Mapping[str, Any]) -> bool:
    """Tell whether the config of a text model says that there are experts."""
    return any(value for key, value in config.items() if "experts" in key)


def unfuse(model: nn.Module, every: bool = False) -> None:
    """Put Experts in the place of every fused module that is known, with weights or without.

    Blocks are renamed as the family's files call them, where transformers renames them.

    Raises:
        CheckpointError: config.json claims absurdly many experts, or more for a token than there
            are.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    found = [(path, part) for path, part in model.named_modules() if _kind(part) is not None]
    rules = get_model_conversion_mapping(model) if found else []
    for path, fused in found:
        _check(len(fused.down_proj), model, path)
        kind: Any = _kind(fused)
        names = _names_on_disk(path, rules)
        experts = kind(fused, names or NAMES, path)
        experts.every = every
        if names is None:
            wholes = (f"{path}.{name}" for name in FUSED)
            experts.fused = {whole: _stored(whole, rules) for whole in wholes}
        model.set_submodule(path, experts)
        _rename(model, path.rpartition(".")[0], rules)


def _check(count: int, model: Any, path: str) -> None:
    """Refuse numbers of experts on which libraries would stumble."""
    if count > MOST_EXPERTS:
        raise CheckpointError(f"config.json claims {count} experts for {path}.")
    chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", 1)
    if chosen not in range(1, count + 1):
        raise CheckpointError(f"config.json gives a token {chosen} of {count} experts.")


def _kind(module: Any) -> type[Experts] | None:
    """Tell which module computes what a fused one does; None if it is not fused, or not known."""
    if type(module).__name__ == "Llama4TextExperts":
        return WeightedExperts
    from transformers.integrations.moe import _default_apply_gate

    plain = (
        getattr(type(module), "_apply_gate", None) is _default_apply_gate
        and module.has_gate
        and module.is_concatenated
        and not (module.has_bias or module.is_transposed)
        and all(getattr(module, name).ndim == 3 for name in FUSED)
    )
    return Experts if plain else None


def _names_on_disk(path: str, rules: Sequence[Any]) -> tuple[str, ...] | None:
    """Find what files call gate, up and down, from how transformers fuses them; None if not."""
    names: list[str] = []
    for fused in FUSED:
        for rule in rules:
            sources = [re.search(r"\*\.(\w+)\.weight$", one) for one in rule.source_patterns]
            target = rule.target_patterns[0].replace("\\", "")
            if f"{path}.{fused}".endswith(target) and all(sources):
                names += [source[1] for source in sources if source]
                break
    return tuple(names) if len(names) == len(NAMES) else None


def _stored(name: str, rules: Sequence[Any]) -> str:
    """Give the name under which transformers would save a tensor or what begins like this."""
    for rule in (rule for rule in rules if type(rule).__name__ == "WeightRenaming"):
        name, _ = rule.reverse_transform().rename_source_key(name)
    return name


def _rename(model: nn.Module, path: str, rules: Sequence[Any]) -> None:
    """Call a block as files do; transformers' code goes on to find it under its own name."""
    parent_path, _, local = path.rpartition(".")
    stored_parent, _, new = _stored(f"{path}.", rules).removesuffix(".").rpartition(".")
    if stored_parent == parent_path and new != local:
        parent = model.get_submodule(parent_path)
        block = parent.get_submodule(local)
        delattr(parent, local)
        parent.add_module(new, block)
        parent.__dict__[local] = block


def name_in_memory(model: nn.Module) -> Callable[[str], str]:
    """Return what turns a name that transformers gives a tensor into the model's own."""
    pairs = [(part.source, name) for name, part in blocks(model)]
    moved = {old.rpartition(".")[0]: new.rpartition(".")[0] for old, new in pairs}

    def rename(name: str) -> str:
        for old, new in moved.items():
            if name.startswith(f"{old}."):
                return new + name.removeprefix(old)
        return name

    return rename


def cuts(model: nn.Module) -> dict[str, Cut]:
    """Say for each expert's weight, by full name, where it lies in a file that fuses them."""
    rename = name_in_memory(model)
    return {
        f"{block}.{name}": cut._replace(whole=rename(cut.whole))
        for block, experts in blocks(model)
        for name, cut in experts.cuts.items()
    }


def fused_in_files(model: nn.Module) -> dict[str, dict[str, Cut]]:
    """Say which tensors the family's files hold in place of experts one by one.

    Returns:
        By the name of the tensor in a file, the cuts by name of the matrix in the model.
    """
    found: dict[str, dict[str, Cut]] = {}
    for block, experts in blocks(model):
        for name, cut in experts.cuts.items():
            if cut.whole in experts.fused:
                found.setdefault(experts.fused[cut.whole], {})[f"{block}.{name}"] = cut
    return found


def check_count(model: nn.Module, reader: Reader) -> None:
    """Raise CheckpointError when a file holds more experts than config.json says."""
    counts = {name: len(experts) for name, experts in blocks(model)}
    for name in reader:
        found = re.match(r"(.+)\.(\d+)\.\w+\.\w+$", name)
        count = counts.get(found[1]) if found else None
        if found and count is not None and int(found[2]) >= count:
            raise CheckpointError(
                f"{reader.folder}: {name} is there, but config.json says {count} experts."
            )


def loading_rules(model: nn.Module, rules: list[Any]) -> list[Any]:
    """Leave out those of transformers' rules that would fuse or rename a model's own tensors."""
    if not blocks(model):
        return rules
    names = list(model.state_dict())

    def harmless(rule: Any) -> bool:
        fuses = any("experts" in target for target in rule.target_patterns)
        return not (fuses and hasattr(rule, "operations")) and all(
            rule.rename_source_key(name)[0] == name for name in names
        )

    return [rule for rule in rules if harmless(rule)]
