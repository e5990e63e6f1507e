"""What a pass is: a frozen dataclass whose fields are its options, with `plan` and `apply`.

`plan` decides and changes nothing; `apply` carries one decision out through `fxopt.edit`. A decision names its node and
holds plain JSON, so that a plan can be printed, replayed on another checkpoint, applied one rewrite at a time, or
rolled back.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from fxopt.program import Program

__all__ = ["Pass", "Rewrite", "Skip", "listed"]

_SHOWN = 4  # names in a decision's text


class Rewrite(NamedTuple):
    """A decision to change something.

    Attributes:
        node: name of the node it is about.
        what: what is done, for people: "fold bn1".
        params: what `apply` needs to carry it out; plain JSON.
    """

    node: str
    what: str
    params: Mapping[str, Any] = {}

    def __str__(self) -> str:
        return f"{self.node}: {self.what}"


class Skip(NamedTuple):
    """A candidate that is left alone.

    Attributes:
        node: name of the node.
        why: the reason, for people: "conv output has 2 users".
    """

    node: str
    why: str

    def __str__(self) -> str:
        return f"{self.node}: {self.why}"


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """Base of all passes. Subclasses are frozen, keyword-only dataclasses.

    Class attributes:
        name: registry name, a snake_case verb phrase.
        exact: whether outputs must not change beyond rounding. The manager proves it at every run.
        requires: properties that the program must have ("quantized", ...).
        provides: properties that it has afterwards.
        refuses: properties that the program must not have.

    The three sets are read from the instance: where they depend on the options, `__post_init__` sets them. An option
    `ignore` holds patterns of layer paths that are left alone: the manager says which of them match nothing.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = False
    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    refuses: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def plan(self, program: Program) -> Iterable[Rewrite | Skip]:
        """Decides what to do at which node, and says why every other candidate is left alone. Changes nothing."""

    @abstractmethod
    def apply(self, program: Program, rewrite: Rewrite) -> None:
        """Carries out one rewrite of the plan, through `fxopt.edit`."""

    def config(self) -> dict[str, Any]:
        """The options, as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        from fxopt.spec import spec_string

        return spec_string(self)


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are, for the text of a decision."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


@dataclass(frozen=True)
class Plan:
    """What a pass means to do with a program.

    Attributes:
        name: of the pass.
        config: its spec string.
        rewrites: what it would change.
        skips: what it would leave alone, with reasons.
    """

    name: str
    config: str
    rewrites: list[Rewrite] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)

    @classmethod
    def of(cls, pass_: Pass, program: Program) -> Plan:
        """Asks `pass_` for its plan, and checks that every decision is what the contract says.

        Raises:
            PassError: if planning fails or changes the program, or if a decision is not a `Rewrite` or `Skip`, names no
                node, or is not JSON.
        """
        from fxopt.errors import FxoptError, PassError

        plan = cls(pass_.name, str(pass_))
        names = {node.name for node in program.graph.nodes}
        before = program.edits
        try:
            decisions = list(pass_.plan(program))
        except FxoptError:
            raise
        except Exception as error:  # whatever goes wrong inside a pass is its failure: named, and chained
            raise PassError(f"plan failed: {type(error).__name__}: {error}", pass_name=pass_.name) from error
        if program.edits != before:
            raise PassError("plan changed the program; only apply may", pass_name=pass_.name)
        for decision in decisions:
            if not isinstance(decision, Rewrite | Skip):
                raise PassError(f"plan must give Rewrite or Skip, not {decision!r}", pass_name=pass_.name)
            if decision.node not in names:
                raise PassError(
                    "the plan names a node that is not in the program", pass_name=pass_.name, node=decision.node
                )
            if isinstance(decision, Skip):
                plan.skips.append(decision)
                continue
            try:
                json.dumps(decision.params)
            except TypeError as error:
                raise PassError(f"params are not JSON: {error}", pass_name=pass_.name, node=decision.node) from error
            plan.rewrites.append(decision)
        return plan

    def __str__(self) -> str:
        lines = [f"{self.config}: {len(self.rewrites)} rewrites, {len(self.skips)} left alone"]
        lines += [f"  + {rewrite}" for rewrite in self.rewrites]
        lines += [f"  - {skip}" for skip in self.skips]
        return "\n".join(lines)
