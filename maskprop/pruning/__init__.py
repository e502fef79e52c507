"""From a model to good masks: coupled groups, scores, pruners, schedules."""

from maskprop.pruning.budget import Budget
from maskprop.pruning.discover import prunable_groups
from maskprop.pruning.groups import Group, Groups, Member
from maskprop.pruning.interop import (
    SemiStructuredReplacer,
    from_torch_prune,
    save_nni_masks,
    semi_structured_masks,
    to_torch_prune,
)
from maskprop.pruning.masking import (
    Mask,
    applied_masks,
    apply_masks,
    masked_state_dict,
    plain_state_dict,
    remove_masks,
)
from maskprop.pruning.movement import MovementPruner
from maskprop.pruning.nni import (
    TorchEvaluator,
    auto_set_denpendency_group_ids,
    auto_set_dependency_group_ids,
    trace,
)
from maskprop.pruning.pruner import Pruner
from maskprop.pruning.pruners import (
    ActivationAPoZRankPruner,
    ActivationMeanRankPruner,
    ADMMPruner,
    FisherPruner,
    FPGMPruner,
    L1NormPruner,
    L2NormPruner,
    LAMPPruner,
    LevelPruner,
    OBDPruner,
    RandomPruner,
    SlimPruner,
    TaylorFOWeightPruner,
    TaylorPruner,
    WandaPruner,
)
from maskprop.pruning.removal import Removal
from maskprop.pruning.schedule import AGPPruner, LinearPruner, LotteryTicketPruner, Schedule
from maskprop.pruning.structure import Cost, measure

__all__ = [
    "ADMMPruner",
    "AGPPruner",
    "ActivationAPoZRankPruner",
    "ActivationMeanRankPruner",
    "Budget",
    "Cost",
    "FPGMPruner",
    "FisherPruner",
    "Group",
    "Groups",
    "L1NormPruner",
    "L2NormPruner",
    "LAMPPruner",
    "LevelPruner",
    "LinearPruner",
    "LotteryTicketPruner",
    "Mask",
    "Member",
    "MovementPruner",
    "OBDPruner",
    "Pruner",
    "RandomPruner",
    "Removal",
    "Schedule",
    "SemiStructuredReplacer",
    "SlimPruner",
    "TaylorFOWeightPruner",
    "TaylorPruner",
    "TorchEvaluator",
    "WandaPruner",
    "applied_masks",
    "apply_masks",
    "auto_set_denpendency_group_ids",
    "auto_set_dependency_group_ids",
    "from_torch_prune",
    "masked_state_dict",
    "measure",
    "plain_state_dict",
    "prunable_groups",
    "remove_masks",
    "save_nni_masks",
    "semi_structured_masks",
    "to_torch_prune",
    "trace",
]
