"""What all stages of a run share, and how they find models, tokenizers and data."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridize.pipeline.artifacts import Artifact
from hybridize.pipeline.progress import Reporter
from hybridize.spec.data import TRACES_FILE, DataSpec, FileDataSpec, TracesDataSpec
from hybridize.spec.stages import TEACHER, DataStage


@dataclass
class Job:
    """What all stages of a run share.

    Attributes:
        teacher: path or name of the teacher.
        data: what training reads unless a stage says otherwise.
        reporter: where progress goes.
        artifacts: finished stages by name.
    """

    teacher: str
    data: DataSpec
    reporter: Reporter
    artifacts: dict[str, Artifact] = field(default_factory=dict)

    def model_path(self, name: str) -> str:
        """Where the model of that name is."""
        return self.teacher if name == TEACHER else str(self.artifacts[name].folder)

    def data_of(self, stage: DataStage) -> Any:
        """What a stage reads: its own data or the recipe's, traces as the file that holds them."""
        data = stage.data or self.data
        if isinstance(data, TracesDataSpec):
            return FileDataSpec(path=str(self.artifacts[data.stage].folder / TRACES_FILE))
        return data

    def tokenizer(self) -> Any:
        """The teacher's tokenizer, which every student shares.

        Raises:
            ValueError: it does not load.
        """
        return load_tokenizer(self.teacher)

    def load_teacher(self) -> Any:
        """The teacher in the working precision, on the working device.

        Raises:
            ValueError: its files are damaged, or it is none.
        """
        from hybridize.models import load_teacher

        check_checkpoint(self.teacher)
        return load_teacher(self.teacher, dtype=working_dtype()).to(device())

    def load_model(self, name: str, *, dtype: Any = "auto") -> Any:
        """The model of that name, in its own precision unless another is asked for.

        Raises:
            ValueError: its files are damaged.
        """
        from hybridize.models import load_model

        path = self.model_path(name)
        check_checkpoint(path)
        return load_model(path, dtype=dtype)


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        ValueError: it does not load; names the path and the remedy.
    """
    from transformers import AutoTokenizer

    if not Path(path).is_dir() and path.count("/") != 1:
        raise ValueError(f"{path}: there is no such folder; check the path")
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        if not Path(path).is_dir():
            raise ValueError(
                f"{path}: there is no such folder, and as the name of a hub repository its tokenizer does not load "
                f"({reason}); check the path"
            ) from None
        raise ValueError(
            f"{path}: its tokenizer does not load ({reason}); put the tokenizer's files beside config.json"
        ) from None


def check_checkpoint(path: str) -> None:
    """Find what is wrong with a checkpoint's files, quickly and before any work is done.

    Raises:
        ValueError: the folder holds no checkpoint, a family that is not in the table, or a damaged file.
    """
    from hybridize.models import find_family
    from hybridize.models.checkpoint import check_files, read_model_type

    folder = Path(path)
    if folder.is_dir():
        find_family(read_model_type(folder), f"{path}/config.json: model_type")
        check_files(folder)


def check_same_vocabulary(model: Any, teacher: Any, model_path: str, teacher_path: str) -> None:
    """Raise a `ValueError` if two models have different vocabularies."""
    if model.config.vocab_size != teacher.config.vocab_size:
        raise ValueError(
            f"{model_path}: its vocabulary has {model.config.vocab_size} entries, but that of {teacher_path} has "
            f"{teacher.config.vocab_size}; give the teacher that the hybrid was converted from"
        )


def device() -> str:
    """Where models run."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def working_dtype() -> Any:
    """What models run in: bf16 on a GPU, fp32 on a CPU."""
    import torch

    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def to_dtype(model: Any, dtype: Any) -> Any:
    """Convert a model's parameters in place, but those of a mixer that must stay fp32."""
    from hybridize.models.adapter import MixerLayer

    kept = {id(p): p.data for m in model.modules() if isinstance(m, MixerLayer) for p in m.cast(dtype).parameters()}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.to(dtype)
    return model
