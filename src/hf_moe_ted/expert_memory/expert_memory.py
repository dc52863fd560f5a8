"""`expert_memory` of `from_pretrained`."""

import os
from dataclasses import dataclass
from typing import Any

from .memory_options import MemoryOptions


@dataclass(frozen=True)
class ExpertMemory(MemoryOptions):
    """Keep only some experts on the device; all of them are in main memory or in their files.

    ```python
    model = ZCodeM3ForConditionalGeneration.from_pretrained(folder, expert_memory=ExpertMemory("8GB"))
    model.expert_memory.statistics()    # hits, misses, bytes, waits
    ```

    Translations are the same as with all experts on the device. Options are those of [`MemoryOptions`]: `size`,
    `statistics`, `languages`, `experts_in` and `max_cpu_slots`.
    """

    def load(self, model_class: Any, folder: str | os.PathLike[str], **options: Any) -> Any:
        """`from_pretrained` calls this if it gets such an object; it takes the same options.

        Raises:
            ValueError: see `load_with_expert_memory`.
        """
        from .loading import load_with_expert_memory  # this loads transformers' models

        return load_with_expert_memory(model_class, folder, self, **options)


__all__ = ["ExpertMemory"]
