"""Small, fast, ordinary single-device models: what autopar must train exactly."""

from . import dense, experts, huggingface, language, routed_experts, vision
from .dense import LARGE_REC
from .entry import Entry

ZOO: dict[str, Entry] = {
    entry.name: entry
    for family in (dense, language, vision, experts, routed_experts, huggingface)
    for entry in family.ENTRIES
}

__all__ = ["LARGE_REC", "ZOO", "Entry"]
