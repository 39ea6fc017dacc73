"""Track-On's head."""

from trackbench.heads.memory.head import MemoryHead

__all__ = ["MemoryHead"]
