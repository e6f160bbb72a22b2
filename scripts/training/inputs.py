"""What a run starts from: the base model, and the pictures with their captions. Nothing here needs torch, whose import takes
seconds, so that it can be read meanwhile."""

from dataclasses import dataclass

from dataset_folder import DatasetFolder
from sections import ProjectSettings
from training.base_model import find_base
from training.config import DataSettings, TrainSettings
from training.dataset import Example, flagged_pictures, read_examples, unused_entries
from training.digests import cache_folder, compute_digests
from training.parts import BaseModel

MANY_REPEATS = 100
"""Of a picture in an epoch; nobody means more."""


@dataclass(frozen=True)
class Inputs:
    """Verified, except for the values of the weights."""

    base: BaseModel
    examples: list[Example]


def read_inputs(project: ProjectSettings, settings: TrainSettings) -> Inputs:
    """Read headers and hash weights, decode pictures and read captions. Raises ModelError, or DataError with everything that
    is wrong with the data."""
    base = find_base(settings.model.base_model, project.models_dir)
    compute_digests(base, cache_folder(project.output_dir))
    return Inputs(base, read_pictures(project, settings.data))


def read_pictures(project: ProjectSettings, settings: DataSettings) -> list[Example]:
    """The examples of the data set; what lies among them and is none is named."""
    dataset = DatasetFolder(project.dataset_dir)
    folder = dataset.images
    flagged = flagged_pictures(dataset, settings.resolution) if settings.skip_flagged else {}
    if flagged:
        print(f"left out, because flagged: {', '.join(f'{name} ({flaws})' for name, flaws in flagged.items())}")
    examples = read_examples(folder, settings.dataloader_num_workers, flagged)
    often = sorted({str(example.path.parent) for example in examples if example.repeats > MANY_REPEATS})
    if often:
        print(f"the number is taken for repeats per epoch; rename the folder if it is a year: {', '.join(often)}")
    without = sum(_as_spoken(project.trigger_word) not in _as_spoken(example.caption) for example in examples)
    if without:
        said = f"{without} of {len(examples)} captions do not have the trigger word {project.trigger_word!r} in them"
        print(f"{said}: run the caption stage again, unless you mean that")
    unused = unused_entries(folder)
    if unused:
        print(f"not used, because neither picture, caption of one, nor N_name folder: {', '.join(unused)}")
    return examples


def _as_spoken(text: str) -> str:
    return text.replace("_", " ").casefold()
