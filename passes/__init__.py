"""Graph passes that turn a captured decoder layer into a probe-pruned one."""

from .base import BlockGraph, GroupNodes, Pass, PassManager, PassResult
from .cleanup import Cleanup
from .find_channel_groups import FindChannelGroups
from .free_head_count import FreeHeadCount
from .gather_channels import GatherChannels
from .insert_compensation import InsertCompensation
from .insert_history import InsertHistory
from .insert_probe import InsertProbe
from .insert_selection import InsertSelection
from .normalize_linears import NormalizeLinears


def probe_pruning() -> PassManager:
    """The passes of Probe Pruning, in order."""
    return PassManager(
        [
            NormalizeLinears(),
            FreeHeadCount(),
            FindChannelGroups(),
            InsertProbe(),
            InsertSelection(),
            GatherChannels(),
            InsertCompensation(),
            InsertHistory(),
            Cleanup(),
        ]
    )


__all__ = [
    "BlockGraph",
    "Cleanup",
    "FindChannelGroups",
    "FreeHeadCount",
    "GatherChannels",
    "GroupNodes",
    "InsertCompensation",
    "InsertHistory",
    "InsertProbe",
    "InsertSelection",
    "NormalizeLinears",
    "Pass",
    "PassManager",
    "PassResult",
    "probe_pruning",
]
