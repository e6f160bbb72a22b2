"""Train a LoRA for SDXL on DATASET_DIR/images and write OUTPUT_DIR/lora/<name>.safetensors, which ComfyUI loads."""

import sys

from errors import exit_code_of, stop_on_signals
from settings import ProjectSettings, read_request
from training.config import TrainSettings

STAGE = "train_lora"


def main(argv: list[str]) -> None:
    stop_on_signals()
    request = read_request(STAGE, __doc__, argv, {"project": ProjectSettings, "train": TrainSettings})
    project, train = request.sections["project"], request.sections["train"]
    print(f"set by you: {request.overridden()}", flush=True)

    from training.device import wake_gpu  # torch and diffusers take seconds to import; a wrong setting is refused before

    wake_gpu()
    from training import doctor, task
    from training.results import only_run_in

    if request.check:
        doctor.check(project, train, is_ahead=request.is_ahead)
        return
    with only_run_in(project.output_dir):
        run = task.decide(project, train)
        if run.is_finished:
            print(f"nothing to do: {run.results.lora} is finished, with exactly these settings, pictures and captions")
            return
        task.make_room(run)
        with task.memory_in_our_words(run), task.coming_unet(run) as unet:
            data = task.encode(run)
            modules, progress = task.train(run, data, unet())
        task.finish(run, modules, progress)


if __name__ == "__main__":
    sys.exit(exit_code_of(STAGE, lambda: main(sys.argv[1:])))
