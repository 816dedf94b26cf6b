"""What every tensor of a checkpoint is for.

``describe_model(specs).role(name)``: from the family's table where there is one, else from structure. Tensors that
differ in their numbers only are one form, decided once: the 35 B model has 62,000 tensors and some sixty forms.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property
from typing import Final, NamedTuple

from tensorsurgeon.models.asked.answers import Answer, answer_for
from tensorsurgeon.models.choosing import use_test
from tensorsurgeon.models.experts import EXPERTS, any_expert
from tensorsurgeon.models.families import Family, family_of
from tensorsurgeon.models.fused import Fusions
from tensorsurgeon.models.layer_lists import lists_of_other_models
from tensorsurgeon.models.roles import LINEARS, NO_LINEARS, PARTS, WITHOUT_CONFIG, Role, Use
from tensorsurgeon.models.rules import LAYERS, Known, is_indexer, part_of, role_inside, role_outside
from tensorsurgeon.models.sizes import Sizes
from tensorsurgeon.tensors.dtypes import WEIGHT_DTYPES
from tensorsurgeon.tensors.spec import SpecMap, TensorSpec

_FIRST: Final = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")


class _Place(NamedTuple):
    """Where a module lies: ``head`` before the first number, ``inside`` what follows it, numbers masked."""

    head: str
    is_layer: bool
    is_beyond: bool
    inside: str


class _ByName(dict[str, Use]):
    """What each tensor is for, found out when it is first asked for: a plan asks tens of thousands of names several times."""

    def __init__(self, decide: Callable[[str], Use]) -> None:
        super().__init__()
        self._decide = decide

    def __missing__(self, name: str) -> Use:
        found = self[name] = self._decide(name)
        return found


class Model:
    """A checkpoint's tensors by role; cheap to make, lazy, and only for the specs it was made of."""

    def __init__(self, specs: SpecMap) -> None:
        self._specs = specs
        self.config = specs.config
        self.sizes = Sizes(specs.config)
        self._uses: dict[tuple[_Place, tuple[int, ...]], Use] = {}
        self._of_experts: dict[tuple[str, tuple[int, ...]], Use] = {}
        self._by_name = _ByName(self._use)
        self._insides: dict[str, str] = {}
        self._is_layers: dict[str, bool] = {}

    @cached_property
    def family(self) -> Family | None:
        """What is known of this model by name; None where there is no data file for it."""
        return family_of(self._specs.config)

    @cached_property
    def answer(self) -> Answer | None:
        """What an engine's own class said of this model; None where it was not asked."""
        return answer_for(self._specs.config)

    @cached_property
    def _fusions(self) -> Fusions:
        return Fusions((), ()) if self.answer is None else self.answer.fusions()

    @cached_property
    def _modules(self) -> frozenset[str]:
        return frozenset(spec.module for spec in self._specs.values())

    def fused_name(self, module: str) -> str | None:
        """What an engine calls the module this one is fused into; None if it stands alone."""
        return self._fusions.name(module, lambda: self._modules)

    @property
    def known_by(self) -> str:
        """By what the model is known, in words: the engine's answer, the data file, or structure alone."""
        known = [] if self.family is None else [f"table of {self.family.name}"]
        if self.answer is not None:
            known.append(f"{self.answer.engine} {self.answer.how} of {self.answer.architecture}")
        return ", ".join([*known, "structure"]) if known else "structure alone: no table names this family"

    @property
    def expert_count(self) -> int:
        """Experts of a layer: by the config, else one for each row of a router; 0 if neither says."""
        rows = (spec.shape[0] for spec in self._specs.values() if len(spec.shape) == 2 and self.role(spec.name) is Role.ROUTER)
        return max(self.sizes.experts, default=0) or next(rows, 0)

    def use(self, name: str) -> Use:
        """What a tensor is for; of a tensor that is not there, what its name tells."""
        return self._by_name[name]

    def told_by_use(self, test: Callable[[Use], bool]) -> Callable[[str], bool]:
        """A test for names by what they are for; asks once for each use there is, for many thousands of names share few."""
        uses = self._by_name
        told: dict[int, bool] = {}  # the names keep the uses, so that an id stays one use's

        def told_of(name: str) -> bool:
            use = uses[name]
            known = told.get(id(use))
            if known is None:
                known = told[id(use)] = test(use)
            return known

        return told_of

    def _use(self, name: str) -> Use:
        spec = self._specs.get(name)
        shape = () if spec is None else spec[2]
        # What holds for one expert of a list holds for all of them, and most names are experts'.
        expert = any_expert(name)
        found = None if expert is None else self._of_experts.get((expert, shape))
        if found is None:
            place = self._place(name)
            found = self._uses.get((place, shape)) or self._decide(place, shape)
            self._uses[place, shape] = found
            if expert is not None:
                self._of_experts[expert, shape] = found
        return found

    def role(self, name: str) -> Role | None:
        """The role of a tensor, of MTP heads and towers the part; None where nothing known decides it."""
        return self.use(name).role

    def module_use(self, module: str) -> Use:
        """What a module's weight is for, whatever tensors hold it."""
        return self.use(module + ".weight")

    def is_mtp(self, module: str) -> bool:
        """Whether a module belongs to the head for multi-token prediction."""
        return self.use(module + ".weight").role is Role.MTP

    def considered(self, name: str) -> str:
        """What was looked at for a tensor of unknown role, in words."""
        known = f"model_type {self._specs.config.get('model_type', 'not given')!r} has no table that names it"
        place = self._place(name)
        where = f"inside layer {place.inside!r}" if place.is_layer else "outside the layers"
        return f"{known}, and {where} no rule of names or sizes applies"

    def chooser(self, *texts: str) -> Callable[[str], bool]:
        """A test for names by any of what stands behind ``role:``: a role, or a part and a role in it (``mtp.expert``).

        RecipeError for words that are no roles.
        """
        return self.told_by_use(use_test([self._resolved(text) for text in texts], with_config="linear" in texts))

    def _resolved(self, text: str) -> str:
        if text != "expert-else-linear":
            return text
        return Role.EXPERT.value if any(self.role(name) is Role.EXPERT for name in self._specs) else "linear"

    def linears(self) -> list[str]:
        """Modules with a float matrix that an engine may take for a linear's weight, in file order.

        Not among them: embeddings, norms, convolutions. Routers are, although engines give them no config.
        """
        is_linear = self.told_by_use(lambda use: use.kind not in NO_LINEARS)
        return [name[:-7] for name in self._matrices() if is_linear(name)]

    def linears_with_config(self) -> list[str]:
        """Those of ``linears`` that an engine may build with a quantization config.

        Not among them: routers and shared-expert gates (formats.md section 7), and the output head, which "all
        linears" means to some readers only.
        """
        kept_out = NO_LINEARS | WITHOUT_CONFIG | {Role.HEAD}
        is_built = self.told_by_use(lambda use: use.kind not in kept_out)
        return [name[:-7] for name in self._matrices() if is_built(name)]

    def _matrices(self) -> list[str]:
        return [spec[0] for spec in self.floats if len(spec[2]) == 2 and spec[0].endswith(".weight")]

    @cached_property
    def floats(self) -> tuple[TensorSpec, ...]:
        """Float tensors of more than one axis, in file order: what is left of a quantized model is few of its tensors."""
        return tuple(spec for spec in self._specs.values() if spec[1] in WEIGHT_DTYPES and len(spec[2]) > 1)

    @cached_property
    def expert_parents(self) -> tuple[str, ...]:
        """Masked paths below which experts lie (``model.layers.*.mlp``)."""
        found: dict[str, None] = {}
        last = "\n"
        for name, _, shape in self._specs.values():
            # By far most names are another expert of the list just met.
            if name.startswith(last):
                continue
            at = name.find(EXPERTS)
            if at >= 0:
                last = name[: at + len(EXPERTS)]
                found[masked(name[:at])] = None
            elif len(shape) == 3 and shape[0] in self.sizes.experts:
                found[masked(name.removesuffix(".weight").rpartition(".")[0])] = None
        return tuple(found)

    @cached_property
    def _other_layers(self) -> frozenset[str]:
        """What stands before the numbers of lists of layers that are not the text model's."""
        return lists_of_other_models(self._specs, (self.sizes.vocabulary, self.sizes.hidden))

    @cached_property
    def _known(self) -> Known:
        return Known(self.sizes.experts, self.expert_parents)

    def _place(self, name: str) -> _Place:
        found = _FIRST.search(name)
        if found is None:
            return _Place("", False, False, name)
        start, stop = found.span()
        head, tail = name[:start], name[stop + 1 :]
        is_layer = self._is_layers.get(head)
        if is_layer is None:
            is_layer = self._is_layers[head] = LAYERS.search(head[:-1].rpartition(".")[2]) is not None
        inside = self._insides.get(tail)
        if inside is None:
            inside = self._insides[tail] = masked(tail)
        beyond = is_layer and int(name[start:stop]) >= self.sizes.layers > 0
        return _Place(head, is_layer, beyond, inside)

    def _decide(self, place: _Place, shape: tuple[int, ...]) -> Use:
        head, is_layer, is_beyond, inside = place
        path = inside.split(".")
        leaf = path.pop()
        outer = [*head[:-1].split("."), "*"] if head else []
        module = ".".join([*outer, *path])
        part = part_of(head, False, False, [*outer, *path])
        if part is None and is_beyond:
            part = part_of(head, True, True, [*outer, *path])
        found = self._of_family(module, f"{module}.{leaf}")
        if found is not None and found[0] in PARTS:
            part, found = found, None
        if found is None and is_layer:
            found = role_inside(f"{head}*", path, leaf, shape, self._known)
        elif found is None:
            found = role_outside([*outer, *path], leaf, shape, self.sizes.hidden, self.sizes.vocabulary)
        if part is None and is_layer and head in self._other_layers:
            return Use(Role.OTHER, None, "layers outside the language model")
        if part is not None:
            return Use(part[0], Role.OTHER if found is None else found[0], part[1])
        if found is None:
            return Use(None, None, "no rule knows it")
        why = self._without_config(module, ".".join(path), found[0]) if is_layer and found[0] in LINEARS else None
        return Use(found[0], None, why or found[1], why is None)

    def _without_config(self, module: str, path: str, role: Role) -> str | None:
        """Why engines build a linear of the main model without a quantization config, in words; None if they do not."""
        if self.family is not None and any(p.match(module) is not None for p in self.family.without_config):
            return f"engines build it without a quantization config (table of {self.family.name})"
        answer = self.answer
        if answer is None:
            return None
        if role is not Role.EXPERT and answer.builds_without_config(path):
            return f"{answer.engine} builds it without a quantization config ({answer.how})"
        parent, leaf = module.rpartition(".")[::2]
        for fused, parts in (*answer.fused.items(), *answer.stacked.items()):
            # The indexer stays as it is, so what is fused with it cannot be quantized either.
            for part in parts if leaf in parts else ():
                ending = f".{part}.weight"
                if is_indexer(part) and any(masked(n) == parent + ending for n in self._specs if n.endswith(ending)):
                    return f"{answer.engine} fuses it into {fused} with {part}, which stays"
        return None

    def _of_family(self, module: str, name: str) -> tuple[Role, str] | None:
        """What the family's table says of a module, or of one tensor of it."""
        if self.family is None:
            return None
        for pattern, role in self.family.roles:
            if pattern.match(module) is not None or pattern.match(name) is not None:
                return role, f"table of {self.family.name}"
        return None


_NUMBER: Final = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")


def masked(name: str) -> str:
    """A name with ``*`` for its numbers."""
    return _NUMBER.sub("*", name)


def describe_model(specs: SpecMap) -> Model:
    """What is known of the model that these tensors make; made once for each set of specs."""
    found = specs.model
    if not isinstance(found, Model):
        found = specs.model = Model(specs)
    return found
