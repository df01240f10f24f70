"""Graph passes that turn a captured decoder layer into a probe-pruned one."""

from ..config import ProbePruningConfig
from .base import BlockGraph, Cut, GroupNodes, Pass, PassManager, PassResult
from .cleanup import Cleanup
from .find_channel_groups import FindChannelGroups
from .free_head_count import FreeHeadCount
from .gather_channels import GatherChannels
from .insert_compensation import InsertCompensation
from .insert_history import InsertHistory
from .insert_probe import InsertProbe
from .insert_selection import InsertSelection
from .insert_split import InsertSplit
from .insert_step import InsertStep
from .localize_weights import LocalizeWeights
from .normalize_linears import NormalizeLinears
from .step_linears import StepLinears
from .sum_shards import SumShards


def probe_pruning(config: ProbePruningConfig | None = None) -> PassManager:
    """The passes of Probe Pruning, in order."""
    config = config or ProbePruningConfig()
    return PassManager(
        [
            NormalizeLinears(),
            SumShards(),
            FreeHeadCount(),
            FindChannelGroups(),
            InsertProbe(whole_keys=config.probe is None or config.probe.attention == "queries"),
            InsertSelection(),
            *([InsertStep()] if config.steps else []),
            GatherChannels(),
            InsertCompensation(),
            InsertHistory(),
            InsertSplit(rolls=config.decode == "rolling"),
            *([StepLinears()] if config.steps else []),
            LocalizeWeights(),
            Cleanup(),
        ]
    )


__all__ = [
    "BlockGraph",
    "Cleanup",
    "Cut",
    "FindChannelGroups",
    "FreeHeadCount",
    "GatherChannels",
    "GroupNodes",
    "InsertCompensation",
    "InsertHistory",
    "InsertProbe",
    "InsertSelection",
    "InsertSplit",
    "InsertStep",
    "LocalizeWeights",
    "NormalizeLinears",
    "Pass",
    "PassManager",
    "PassResult",
    "StepLinears",
    "SumShards",
    "probe_pruning",
]
