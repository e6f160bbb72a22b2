"""The demo environment: a folder with a tiny SDXL, a tiny tagger, a workflow with its node ids, prompts and a face.

It is passed to the stages through environment variables only, so it neither uses nor changes any file of the user.
"""

import os
from dataclasses import dataclass, make_dataclass
from pathlib import Path

from captioning.config import CaptionSettings
from collecting.config import CollectSettings
from common.files import write_json
from common.project import ProjectSettings
from common.settings import REPOSITORY, SETTINGS_FILE, all_keys, resolve
from common.settings_file import TABLES
from demo import tiny_sdxl, tiny_tagger
from demo.standin_comfyui.images import scene
from demo.standin_comfyui.server import StandIn
from training.config import TrainSettings

SECTIONS = (ProjectSettings, CollectSettings, CaptionSettings, TrainSettings)
RUN_SH = REPOSITORY / "scripts" / "run.sh"
TRIGGER_WORD = "demo_person"
IMAGE_SIZE_PX = (256, 320)
PROMPTS = [
    "portrait in a garden, smiling",
    "full body, walking through a forest",
    "close-up in a studio, looking at viewer",
    "sitting in a room, reading a book",
    "on a beach, wind in the hair",
    "in a city street, from the side",
    "at night, city lights behind",
    "in the snow, winter coat",
    "watching the sunset, from behind",
    "upper body in a garden, hat",
]
NODE_IDS = {"image_loader_node": "1", "positive_prompt_node": "4", "seed_node": "6", "output_node": "8"}


@dataclass(frozen=True)
class DemoEnvironment:
    """A demo environment; everything is in `folder`."""

    folder: Path

    @classmethod
    def build(cls, folder: Path) -> "DemoEnvironment":
        """Create the demo environment in `folder`, which must be empty or absent. Takes seconds."""
        demo = cls(folder.resolve())
        tiny_sdxl.build(demo.models / "tiny-sdxl")
        tiny_tagger.build(demo.models / "tiny-tagger")
        write_json(demo.folder / "workflow.json", workflow())
        write_json(demo.folder / "workflow_config.json", NODE_IDS)
        write_json(demo.folder / "prompts.json", [{"prompt": prompt, "seed": seed} for seed, prompt in enumerate(PROMPTS)])
        scene("portrait in a studio", 1, (384, 384)).save(demo.folder / "face.png")
        return demo

    @property
    def models(self) -> Path:
        return self.folder / "models"

    @property
    def dataset(self) -> Path:
        return self.folder / "dataset"

    @property
    def output(self) -> Path:
        return self.folder / "output"

    @property
    def lora(self) -> Path:
        """The LoRA file that a complete run writes."""
        return self.output / "lora" / f"{TRIGGER_WORD}.safetensors"

    def serve(self) -> StandIn:
        """The stand-in ComfyUI, as a context manager; its address is `url`."""
        return StandIn(self.folder / "comfyui")

    def environment(self, comfyui_url: str, settings_file: Path = SETTINGS_FILE, **settings: object) -> dict[str, str]:
        """Environment variables for run.sh and the stages; `settings` (names in lower or upper case) override those of the demo.

        Settings in the user's environment are removed, those in `settings_file` are overridden, and nothing is
        downloaded.
        """
        of_demo = {
            "trigger_word": TRIGGER_WORD,
            "dataset_dir": self.dataset,
            "output_dir": self.output,
            "models_dir": self.models,
            "comfyui_endpoint": comfyui_url,
            "comfyui_workflow": self.folder / "workflow.json",
            "workflow_config": self.folder / "workflow_config.json",
            "prompts_file": self.folder / "prompts.json",
            "face_reference": self.folder / "face.png",
            "comfyui_delay": 0,
            "face_model": "off",  # the images are too small for faces
            "caption_model": "tiny-tagger",
            "base_model": "tiny-sdxl",
            "resolution": 128,
            "caption_variants": 2,
            "lora_rank": 4,
            "lora_alpha": 4,
            "train_batch_size": 2,
            "num_train_epochs": 4,
            "save_every_epochs": 2,
            "dataloader_num_workers": 1,
            "samples": False,
        }
        kept = {name: value for name, value in os.environ.items() if name not in setting_names()}
        changed = {name.upper(): str(value) for name, value in (defaults(settings_file) | of_demo | settings).items()}
        # Networks this small gain nothing from threads, and on a busy machine threads wait for each other much longer.
        for_machine = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return kept | for_machine | changed


def setting_names() -> set[str]:
    """Every environment variable that the pipeline reads."""
    return {key.name.upper() for section in SECTIONS for key in all_keys(section)} | {"REVIEW", "STRICT"}


def defaults(file: Path) -> dict[str, str]:
    """The default of each setting that `file` changes, as the value of a variable. There is none for a setting that is not set
    by default."""
    changed = resolve(file, {}, [], make_dataclass("Tables", zip(TABLES, SECTIONS, strict=True))).overrides
    keys = [key for section in SECTIONS for key in all_keys(section) if key.name in changed and key.default not in (None, "")]
    return {key.name: "," if key.default == () else str(key.default) for key in keys}


def workflow() -> dict[str, dict]:
    """A ComfyUI workflow in API format that makes one image from the face, a prompt and a seed."""
    width, height = IMAGE_SIZE_PX
    return {
        "1": _node("LoadImage", image="example.png"),
        "2": _node("ImageScale", image=["1", 0], upscale_method="lanczos", width=width, height=height, crop="center"),
        "3": _node("CheckpointLoaderSimple", ckpt_name="tiny_sdxl_random.safetensors"),
        "4": _node("CLIPTextEncode", clip=["3", 1], text="the prompt from prompts.json"),
        "5": _node("CLIPTextEncode", clip=["3", 1], text="text, watermark"),
        "6": _node(
            "KSampler",
            model=["3", 0],
            positive=["4", 0],
            negative=["5", 0],
            latent_image=["9", 0],
            seed=0,
            steps=6,
            cfg=7.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=0.9,
        ),
        "7": _node("VAEDecode", samples=["6", 0], vae=["3", 2]),
        "8": _node("SaveImage", images=["7", 0], filename_prefix="demo/person"),
        "9": _node("VAEEncode", pixels=["2", 0], vae=["3", 2]),
    }


def _node(class_type: str, **inputs: object) -> dict:
    return {"class_type": class_type, "inputs": inputs}
