"""The settings of fxopt: every criterion and scope, with and without the calibration images."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

import fxopt
from benchmarks.prune_accuracy.study import FXOPT, Setting, Study
from fxopt.analysis.importance import CRITERIA
from fxopt.errors import InputError
from fxopt.manager import PassManager
from fxopt.passes.prune_channels import PruneChannels
from fxopt.program import Program

__all__ = ["DEFAULT", "PLAIN", "SCOPES", "fxopt_settings"]

DEFAULT, PLAIN = "default, data", "l2, global"
"""What one gets for `PruneChannels(macs=m)` and calibration data; and the simplest that there is."""

SCOPES = ("global", "isomorphic", "layer")


def fxopt_settings(study: Study) -> list[Setting]:
    """The default first. Criteria that take data are left out where there are none."""
    # captured once, and planned once, since what is measured for a plan stays with the program that is planned
    programs = {
        "": fxopt.optimize(study.model, study.example, []),
        ", data": fxopt.optimize(study.model, study.example, [], calibration=study.batches),
    }
    list(PruneChannels(ratio=0.5).plan(programs[", data"]))
    return [
        Setting(FXOPT, DEFAULT, partial(_pruned, programs[", data"])),
        *(
            Setting(FXOPT, f"{criterion}, {scope}{suffix}", partial(_pruned, program, criterion=criterion, scope=scope))
            for criterion in CRITERIA
            for scope in SCOPES
            for suffix, program in programs.items()
            if suffix or not _takes_data(criterion, program)
        ),
    ]


def _pruned(program: Program, budget: float, **options: Any) -> nn.Module:
    return PassManager([PruneChannels(macs=budget, **options)]).run(program).module.eval()


def _takes_data(criterion: str, program: Program) -> bool:
    """Whether it refuses a program without data."""
    try:
        list(PruneChannels(ratio=0.5, criterion=criterion).plan(program))
    except InputError:
        return True
    return False
