"""How many sample images, of which size and with how many steps: near 20 % of the training time, and within the memory."""

from dataclasses import replace

import pytest

from training.callbacks.sample_plan import SamplePlan, plan_samples
from training.config import DataSettings, RunSettings, SampleSettings, SavingSettings, TrainSettings
from training.data.examples import Example
from training.memory_budget import MemoryBudget
from training.models.base_model import find_base
from training.models.sdxl import Schedule
from training.plan import make_plan

GIB = 2**30
CHOICES = "sample_steps", "sample_size", "sample_every_epochs"
ROOMY = MemoryBudget(8 * GIB, 0, 5 * GIB, GIB, 80 * GIB, 8 * GIB, None, False)


@pytest.fixture(scope="module")
def planned(tiny_sdxl, tmp_path_factory):
    """`planned(images, epochs, ...)`: the plan of the samples of a run, and the settings."""
    base = find_base(str(tiny_sdxl), tiny_sdxl.parent)
    path = tmp_path_factory.mktemp("planned")
    wide = base.components["vae"]
    base = replace(base, components=base.components | {"vae": replace(wide, config=wide.config | {"block_out_channels": [128]})})

    def plan(
        images: int,
        epochs: int,
        every: int = 5,
        budget: MemoryBudget = ROOMY,
        recorded: dict | None = None,
        side: int = 1024,
        batch: int = 4,
        **how,
    ) -> tuple[SamplePlan | None, SampleSettings]:
        examples = [Example(path, f"{i}", "sks, 1girl", side, side, 1, f"{i}", trigger="sks") for i in range(images)]
        settings = TrainSettings(
            data=DataSettings(resolution=side),
            run=RunSettings(num_train_epochs=epochs, train_batch_size=batch),
            saving=SavingSettings(save_every_epochs=every),
            samples=SampleSettings(**how),
        )
        return plan_samples(settings, "sks", make_plan(examples, settings, Schedule()), budget, base, recorded or {})

    return plan


def chosen(planned, *run, **how) -> tuple[int, int, int]:
    """Steps, size and epochs between rows."""
    _, settings = planned(*run, **how)
    return settings.sample_steps, settings.sample_size, settings.sample_every_epochs


def test_a_run_of_the_usual_length_has_what_auto_means(planned):
    plan, _ = planned(250, 20)
    assert chosen(planned, 250, 20) == (20, 1024, 5)
    assert plan.announcement == (
        "sample images: 6 prompts x 7 (base model, 4 LoRAs, and one of them at 2 lower strengths), 1024x1024, 20 steps: about 19 % "
        "of the training time, and 8.7 GiB of memory besides it"
    )
    assert {(prompt.width, prompt.height, prompt.steps, prompt.guidance) for prompt in plan.prompts} == {(1024, 1024, 20, 6.0)}
    assert [prompt.seed for prompt in plan.prompts] == [0, 1, 2, 3, 4, 5]
    assert [epochs for epochs in range(1, 21) if plan.is_due(epochs - 1, epochs)] == [5, 10, 15, 20]


def test_first_steps_then_size_then_rows_are_lowered(planned):
    assert chosen(planned, 170, 20) == (13, 1024, 5)
    assert chosen(planned, 120, 20) == (12, 896, 5)
    assert chosen(planned, 70, 20) == (12, 768, 10)
    steps, size, every = chosen(planned, 90, 20)
    assert (steps, every) == (12, 5)
    assert 768 <= size < 1024
    assert chosen(planned, 25, 100)[:2] == (12, 768)
    assert chosen(planned, 25, 100)[2] in (10, 15)
    plan, settings = planned(4, 100)
    assert (settings.sample_steps, settings.sample_size) == (12, 768)
    assert [epochs for epochs in range(1, 100) if plan.is_due(epochs - 1, epochs)] == [50]  # the middle is always there
    assert "steps 20 -> 12, size 1024 -> 768, epochs between images 5 -> 50" in plan.announcement


def test_short_runs_have_base_middle_and_last_and_say_what_they_cost(planned):
    """18 images of 768 px with 12 steps take as long as 140 training samples of 1024 px."""
    plan, settings = planned(65, 20)
    assert plan.lower_strengths == (0.6, 0.8)
    plan, settings = planned(40, 20)
    assert (settings.sample_steps, settings.sample_size, settings.sample_every_epochs) == (12, 768, 10)
    assert plan.lower_strengths == ()
    assert "6 prompts x 3 (base model, 2 LoRAs), 768x768, 12 steps: about 18 % of the training time (" in plan.announcement
    assert "lower strengths 2 -> 0), and 5.0 GiB" in plan.announcement
    plan, _ = planned(25, 20)
    assert "about 28 % of the training time (" in plan.announcement
    assert "strengths 2 -> 0; a short run has no fewer; SAMPLES=false: none)" in plan.announcement
    again, _ = planned(40, 20, recorded={"samples": True} | {name: getattr(settings, name) for name in CHOICES})
    assert again.lower_strengths == ()
    assert planned(25, 20, sample_every_epochs=10)[0].lower_strengths == (0.6, 0.8)


def test_what_is_set_is_not_lowered(planned):
    set_by_user = {"sample_steps": 30, "sample_size": 1000, "sample_every_epochs": 2}
    assert chosen(planned, 4, 20, **set_by_user) == (30, 960, 2)
    assert chosen(planned, 4, 20, sample_every_epochs=0)[2] == 0


@pytest.mark.parametrize(("side", "size"), [(512, 512), (700 // 64 * 64, 640), (1536, 1024)])
def test_images_are_not_larger_than_the_resolution(planned, side, size):
    assert chosen(planned, 400, 20, side=side)[1] == size


def test_one_lora_is_one_row_more_than_the_base_model(planned):
    plan, settings = planned(150, 20, every=0)
    assert settings.sample_every_epochs == 0
    assert "x 4 (base model, 1 LoRA, and one of them at 2 lower strengths)" in plan.announcement
    assert not plan.is_due(0, 20)


def test_off(planned):
    plan, settings = planned(4, 20, samples=False, sample_prompts="none.txt")
    assert plan is None
    assert (settings.sample_steps, settings.sample_size, settings.sample_every_epochs) == (20, 1024, 5)


def test_a_run_that_is_continued_keeps_its_choices(planned):
    recorded = {"samples": True, "sample_steps": 13, "sample_size": 832, "sample_every_epochs": 10}
    assert chosen(planned, 150, 20, recorded=recorded) == (13, 832, 10)
    assert chosen(planned, 150, 20, recorded=recorded, sample_steps=8) == (8, 832, 10)
    assert chosen(planned, 170, 20, recorded=recorded | {"samples": False}) == (13, 1024, 5)


def test_with_little_memory_there_are_tiles_then_smaller_images_then_none(planned):
    little = MemoryBudget(8 * GIB, 0, GIB // 8, GIB, 0, 0, None, False)  # half a GiB of activations
    used = little.needed(4, checkpointing=False)

    def with_free(free_gib: float) -> tuple[SamplePlan, int]:
        plan, settings = planned(170, 20, budget=replace(little, available=used + int(free_gib * GIB)))
        return plan, settings.sample_size

    assert (with_free(9)[0].tiled, with_free(9)[1]) == (False, 1024)
    assert (with_free(3)[0].tiled, with_free(3)[1]) == (True, 1024)
    plan, _ = with_free(1)
    assert plan.prompts == ()
    assert plan.announcement.startswith("sample images: none (they need 1.8 GiB more than training, 1.0 GiB are free")


def test_samples_and_steps_take_turns_in_the_memory_of_activations(planned):
    """Where they do not fit beside each other; before images are decoded in tiles, or are smaller."""
    used = ROOMY.needed(4, checkpointing=False)
    plan, settings = planned(250, 20, budget=replace(ROOMY, available=used))
    assert (plan.in_turn, plan.tiled, settings.sample_size) == (True, False, 1024)
    assert plan.announcement.endswith("% of the training time, in the memory of training")
    for free_gib, in_turn in ((16, True), (17, False)):  # 8 of them remain free beside training
        plan, _ = planned(250, 20, budget=replace(ROOMY, available=used + free_gib * GIB))
        assert (plan.in_turn, plan.tiled) == (in_turn, False)
    small = MemoryBudget(4 * GIB, 0, 5 * GIB, GIB, 0, 0, None, False)
    checkpointing = replace(small, per_image=GIB, available=small.needed(1, checkpointing=True) + int(1.4 * GIB))
    plan, settings = planned(250, 20, budget=checkpointing, batch=1)
    assert (plan.in_turn, plan.tiled, settings.sample_size) == (True, True, 1024)
    assert plan.announcement.endswith(", in the memory of training and 1.3 GiB more")
    growing = replace(checkpointing, grows_segments=True, available=small.needed(1, checkpointing=True) + int(0.7 * GIB))
    plan, settings = planned(250, 20, budget=growing, batch=1)
    assert (plan.in_turn, plan.tiled, settings.sample_size) == (True, True, 1024)
    assert plan.announcement.endswith(", in the memory of training and 0.6 GiB more")
