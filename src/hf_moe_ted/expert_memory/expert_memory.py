"""`expert_memory` of `from_pretrained`."""

import os
from dataclasses import dataclass
from typing import Any

from .memory_options import MemoryOptions


@dataclass(frozen=True)
class ExpertMemory(MemoryOptions):
    """Experts that are not all on the device: a part of them there, all of them in main memory or in their files.

    ```python
    model = ZCodeM3ForConditionalGeneration.from_pretrained(folder, expert_memory=ExpertMemory("8GB"))
    model.expert_memory.statistics()    # hits, misses, bytes, waits
    ```

    Translations are those of the model with all experts on the device. Options are those of [`MemoryOptions`]: `size`,
    `statistics`, `languages`, `experts_in` and `max_cpu_slots`.
    """

    def load(self, model_class: Any, folder: str | os.PathLike[str], **options: Any) -> Any:
        """What `from_pretrained` of a model class calls that is given this object; options as there.

        Raises:
            ValueError: see `load_with_expert_memory`.
        """
        from .loading import load_with_expert_memory  # which loads transformers' models

        return load_with_expert_memory(model_class, folder, self, **options)


__all__ = ["ExpertMemory"]
