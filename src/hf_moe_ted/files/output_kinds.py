"""How to recognise outputs of this package among other content of a folder; only such outputs are replaced."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_MARKER_BYTES = 2**20
_CODE = "|".join(re.escape(path.name) for path in (Path(__file__).parents[1] / "models").glob("*.py"))  # for the Hub
_MODEL_FILES = (
    r"config\.json|generation_config\.json|model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|tokenizer\.json|"
    r"tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|sentencepiece\.bpe\.model|vocab\.json|"
    rf"merges\.txt|chat_template\.jinja|{_CODE}"
)
_REPORT_FILES = r"compression_report\.json|report\.md|README\.md|compression_report/[\w-]+\.(png|svg)"
_TRAINING_STATE_FILES = r"training_state\.pt|whole_state\.json|\.metadata|__\d+_\d+\.distcp"


@dataclass(frozen=True)
class OutputKind:
    """The content of one kind of output folder.

    Attributes:
        what: its name in messages.
        files: regular expression of the names of its files, relative to the folder, with `/`.
        mark_file: a file that every such folder has.
        mark: regular expression (bytes) for content of that file.
        last: the file that loading needs; it is written last.
        with_file: names that match `more_files` belong to the output only if this file exists.
        more_files: regular expression for such names.
    """

    what: str
    files: str
    mark_file: str
    mark: bytes = b""
    last: str | None = None
    with_file: str = ""
    more_files: str = ""

    def why_not(self, folder: Path, paths: Iterable[Path], *, is_partial: bool = False) -> str | None:
        """Why a folder is not only such an output; `None` if it is.

        Args:
            folder: a folder that is not empty.
            paths: all paths in it.
            is_partial: whether a run was stopped while it moved its files there; then the last one may be missing.
        """
        files = self.files
        if self.with_file and (folder / self.with_file).is_file():
            files += f"|{self.more_files}"
        for path in paths:
            name = path.relative_to(folder).as_posix()
            if path.is_symlink() or not (path.is_dir() or re.fullmatch(files, name)):
                return f"it has {name}"
            if path.is_dir() and not any(path.iterdir()):
                return f"it has the folder {name}"
        mark_file = folder / self.mark_file
        if not mark_file.is_file():
            return None if is_partial else f"it has no {self.mark_file}"
        with mark_file.open("rb") as file:
            has_mark = re.search(self.mark, file.read(_MARKER_BYTES)) is not None
        return None if has_mark else f"its {self.mark_file} was not written by this package"


MODEL = OutputKind(
    "a ZCodeM3 model",
    _MODEL_FILES,
    "config.json",
    rb'"model_type"\s*:\s*"zcode_m3"',
    last="config.json",
    with_file="compression_report.json",
    more_files=_REPORT_FILES,
)
ADAPTER = OutputKind(
    "an adapter of PEFT",
    r"([\w-]+/)?adapter_(config\.json|model\.safetensors)|README\.md",
    "adapter_config.json",
    rb'"peft_type"',
    last="adapter_config.json",
)
M2M100_EXPORT = OutputKind(
    "an exported M2M100 model",
    _MODEL_FILES,
    "config.json",
    rb'"exported_from"\s*:\s*"zcode_m3"',
    last="config.json",
)
DEEPSPEED_EXPORT = OutputKind(
    "an exported DeepSpeed checkpoint",
    r"latest|global_step0/(layer_\d+_expert_\d+_)?mp_rank_\d+_model_states\.pt",
    "latest",
    rb"^global_step0\s*$",
    last="latest",
)
EXPERT_STATISTICS = OutputKind(
    "expert statistics",
    r"expert_statistics\.(json|safetensors)",
    "expert_statistics.json",
    rb'"format"\s*:\s*"hf_moe_ted\.expert_statistics"',
    last="expert_statistics.json",
)
TRAINING_STATE = OutputKind("a training state", _TRAINING_STATE_FILES, "training_state.pt", last="training_state.pt")
ACCELERATOR_STATE = OutputKind(
    "what save_state writes",
    rf"training_state_\d+/({_TRAINING_STATE_FILES})|random_states_\d+\.pkl|custom_checkpoint_\d+\.pkl|scaler\.pt|"
    r"(scheduler|sampler|dl_state_dict)(_\d+)?\.bin",
    "random_states_0.pkl",
    last="training_state_0/training_state.pt",
)
TRAINER_CHECKPOINT = OutputKind(
    "a checkpoint of a Trainer",
    rf"{_MODEL_FILES}|training_state/({_TRAINING_STATE_FILES})|trainer_state\.json|training_args\.bin|"
    r"(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth|([\w-]+/)?adapter_(config\.json|model\.(safetensors|bin))|"
    r"README\.md|vocab\.txt|tokenizer\.model|(source|target)\.spm|latest|zero_to_fp32\.py|global_step\d+/.*|"
    r"(pytorch_model_fsdp|optimizer)_\d+/.*|"
    r"pytorch_model(-\d{5}-of-\d{5})?\.bin(\.index\.json)?|spiece\.model|chat_templates/.*|"
    r"(processor|preprocessor|feature_extractor)_config\.json",
    "trainer_state.json",
    last="trainer_state.json",
)

__all__ = [
    "ACCELERATOR_STATE",
    "ADAPTER",
    "DEEPSPEED_EXPORT",
    "EXPERT_STATISTICS",
    "M2M100_EXPORT",
    "MODEL",
    "TRAINER_CHECKPOINT",
    "TRAINING_STATE",
    "OutputKind",
]
