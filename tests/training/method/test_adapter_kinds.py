"""LoRA, DoRA, LoHa and LoKr, of linear layers and convolutions: PEFT trains what loaders make of the file.

The weights that a file gives are computed here from the published formulas, one number after the other where that is feasible.
"""

import csv

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file

from common.errors import ModelError, SettingsError
from demo import tiny_sdxl
from training.config import LoraSettings
from training.engine import prepare_unet
from training.method.adapters import ADAPTER, inject
from training.method.comfyui_modules import COMFYUI_MODULES
from training.method.export import is_lora_of, load_lora, write_lora
from training.method.layers import adapted_layers, count_weights, kohya_name, weight_shapes
from training.models.base_model import find_base
from training.models.weights import load_unet

CPU = torch.device("cpu")
KINDS = {
    "lora": {"lora_type": "lora"},
    "rslora": {"lora_type": "lora", "lora_rslora": True},
    "dora": {"lora_type": "dora"},
    "loha": {"lora_type": "loha"},
    "loha, rslora": {"lora_type": "loha", "lora_rslora": True},
    "lokr": {"lora_type": "lokr"},  # in the tiny network, whole matrices and factors
    "lokr, factor": {"lora_type": "lokr", "lokr_factor": 2},
    "lokr, whole": {"lora_type": "lokr", "lora_rank": 512, "lora_conv_rank": 512},
}
KEYS = {
    "lora": ({"lora_down.weight", "lora_up.weight", "alpha"},),
    "dora": ({"lora_down.weight", "lora_up.weight", "alpha", "dora_scale"},),
    "loha": ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"},),
    "lokr": ({"lokr_w1", "lokr_w2", "alpha"}, {"lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"}),
}
"""As kohya's trainer and LyCORIS write them; never with a decomposed kernel (lora_mid, hada_t1, lokr_t2)."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tiny_sdxl.build(tmp_path_factory.mktemp("models") / "tiny")
    return find_base(str(folder), folder.parent)


def injected(base, **settings):
    few = {"lora_rank_pattern": r"transformer_blocks.[1-9]=0"}  # each has the layers of block 0
    settings = {"lora_rank": 4, "lora_alpha": 3.0, "lora_conv_rank": 3} | few | settings
    unet = load_unet(base, CPU, torch.float32)
    return unet, inject(unet, LoraSettings(**settings), seed=5)


def disturb(adapter) -> None:
    """Give every weight some effect."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        adapter.weights.add_(0.05 * torch.randn(adapter.weights.shape, generator=generator))


def patched(weight: torch.Tensor, lora: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """`weight` as a loader changes it, by the formulas of LoRA, LoHa (FedPara, arXiv 2108.06098) and LoKr (arXiv 2309.14859), with
    the scale and the order of a file of kohya's trainer or LyCORIS."""
    part = {key.removeprefix(f"{name}."): tensor.double().numpy() for key, tensor in lora.items() if key.startswith(f"{name}.")}
    rows, alpha = weight.double().flatten(1).numpy(), float(part["alpha"])
    if "lora_up.weight" in part:
        up, down = (part[f"lora_{each}.weight"] for each in ("up", "down"))
        change = alpha / len(down) * np.einsum("or,ri->oi", up.reshape(len(up), -1), down.reshape(len(down), -1))
    elif "hada_w1_a" in part:
        left, right = (np.einsum("or,ri->oi", part[f"hada_w{n}_a"], part[f"hada_w{n}_b"]) for n in (1, 2))
        change = alpha / len(part["hada_w1_b"]) * left * right
    else:
        small = part["lokr_w1"]
        is_whole = "lokr_w2" in part
        large = part["lokr_w2"] if is_whole else np.einsum("or,ri->oi", part["lokr_w2_a"], part["lokr_w2_b"])
        large = large.reshape(weight.shape[0] // small.shape[0], weight.shape[1] // small.shape[1], -1)
        # kron(small, large)[a * K + k, b * N + n] = small[a, b] * large[k, n]
        change = np.einsum("ab,knx->akbnx", small, large) * (1 if is_whole else alpha / len(part["lokr_w2_b"]))
        change = change.reshape(rows.shape)
    total = rows + change
    if "dora_scale" in part:
        assert part["dora_scale"].shape == (len(weight), *[1] * (weight.dim() - 1))
        total *= part["dora_scale"].reshape(-1, 1) / np.linalg.norm(rows, axis=1, keepdims=True)
    return torch.from_numpy(total).view(weight.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_gives_the_weights_that_peft_trained(base, tmp_path, kind):
    """Those that PEFT itself would merge, for linear layers and convolutions, after every weight was changed."""
    unet, adapter = injected(base, **KINDS[kind])
    disturb(adapter)
    write_lora(tmp_path / "mia.safetensors", adapter.modules, {})
    lora = load_file(tmp_path / "mia.safetensors")
    names = {kohya_name(module.name) for module in adapter.modules}
    found = {frozenset(key.split(".", 1)[1] for key in lora if key.startswith(f"{name}.")) for name in names}
    assert found <= set(map(frozenset, KEYS[KINDS[kind]["lora_type"]]))
    assert {key.split(".", 1)[0] for key in lora} == names
    shapes = set()
    for module in adapter.modules:
        layer = unet.get_submodule(module.name)
        weight = layer.get_base_layer().weight.detach().clone()
        expected = patched(weight, lora, kohya_name(module.name))
        layer.merge(adapter_names=[ADAPTER])
        change = (layer.get_base_layer().weight - weight).double()
        assert change.norm() > 1e-3 * weight.norm(), module.name
        assert (expected - weight - change).norm() <= 2e-3 * change.norm(), module.name  # fp16 in the file
        shapes.add(weight.shape[2:])
    assert shapes == {(), (3, 3)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_read_back_as_it_was_written(base, tmp_path, kind):
    _, adapter = injected(base, **KINDS[kind])
    disturb(adapter)
    with torch.no_grad():
        for module in adapter.modules:
            for factor in module.factors.values():
                factor.copy_(factor.half())
    before = adapter.weights.detach().clone()
    write_lora(tmp_path / "mia.safetensors", adapter.modules, {})
    assert is_lora_of(tmp_path / "mia.safetensors", adapter.modules)
    assert not is_lora_of(tmp_path / "mia.safetensors", adapter.modules[1:])
    adapter.weights.data.fill_(1)
    load_lora(tmp_path / "mia.safetensors", adapter.modules)
    torch.testing.assert_close(adapter.weights.detach(), before, rtol=1e-5, atol=1e-6)
    other, rank = injected(base, lora_rank=5, lora_conv_rank=5)[1], KINDS[kind].get("lora_rank", 4)
    assert not is_lora_of(tmp_path / "mia.safetensors", other.modules), rank


def inputs() -> tuple:
    generator = torch.Generator().manual_seed(3)
    given = {
        "encoder_hidden_states": torch.randn(1, 77, 96, generator=generator),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(1, 64, generator=generator),
            "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]]),
        },
    }
    return (torch.randn(1, 4, 16, 16, generator=generator), torch.tensor([500])), given


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing_and_every_layer_can_begin_to_learn(base, kind):
    unet, adapter = injected(base, **KINDS[kind])
    network = load_unet(base, CPU, torch.float32)
    prepare_unet("plain", unet, adapter, CPU)
    positional, named = inputs()
    torch.testing.assert_close(unet(*positional, **named).sample, network(*positional, **named).sample, rtol=1e-3, atol=1e-4)
    unet(*positional, **named).sample.square().sum().backward()
    assert adapter.weights.grad.isfinite().all()
    start = adapter.weights.detach()
    assert start.untyped_storage().data_ptr() == adapter.modules[0].zero.untyped_storage().data_ptr()
    for module in adapter.modules:
        gradient = next(p for p in unet.get_submodule(module.name).parameters() if p.data_ptr() == module.zero.data_ptr()).grad
        assert gradient.norm() > 0, module.name
        assert not module.zero.any()
    # autograd wrote into the flat gradient, which optimizers read
    assert (adapter.weights.grad != 0).sum() >= sum(module.zero.numel() for module in adapter.modules) * 0.9


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "lokr, factor"])
def test_the_prediction_is_that_of_the_file_merged_into_the_base(base, tmp_path, kind):
    unet, adapter = injected(base, **KINDS[kind])
    disturb(adapter)
    prepare_unet("plain", unet, adapter, CPU)
    write_lora(tmp_path / "mia.safetensors", adapter.modules, {})
    lora, merged = load_file(tmp_path / "mia.safetensors"), load_unet(base, CPU, torch.float32)
    positional, named = inputs()
    plain = merged(*positional, **named).sample
    weights = merged.state_dict()
    for module in adapter.modules:
        weight = weights[f"{module.name}.weight"]
        weight.copy_(patched(weight, lora, kohya_name(module.name)))
    expected = merged(*positional, **named).sample
    change = (unet(*positional, **named).sample - plain, expected - plain)
    assert (change[0] - change[1]).norm() < 0.01 * change[1].norm()


def test_first_weights_are_those_of_lycoris_and_peft(base):
    """LoHa: normal with 0.1 and 1, and one factor of zeros; LoKr: Kaiming's with a = sqrt(5), uniform in 1 / sqrt(fan in)."""
    for module in injected(base, lora_type="loha", lora_rank=32)[1].modules:
        deviations = {key: factor.std().item() for key, factor in module.factors.items()}
        expected = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_a": 0.0, "hada_w2_b": 1.0}
        assert deviations == pytest.approx(expected, rel=0.15), module.name
    for module in injected(base, lora_type="lokr", lokr_factor=4)[1].modules:
        assert not module.zero.any()
        for key, factor in module.factors.items():
            if factor is not module.zero:
                assert 0.2 < factor.abs().max() * factor.shape[1] ** 0.5 <= 1.0001, (module.name, key)
    one, same, other = (
        inject(load_unet(base, CPU, torch.float32), LoraSettings(lora_rank=4, lora_type="loha"), seed=seed).weights
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_scale_of_rslora_is_pefts(base):
    unet, reference = load_unet(base, CPU, torch.float32), load_unet(base, CPU, torch.float32)
    adapter = inject(unet, LoraSettings(lora_rank=9, lora_alpha=6.0, lora_rslora=True), seed=0)
    config = LoraConfig(r=9, lora_alpha=6.0, use_rslora=True, target_modules=[module.name for module in adapter.modules])
    inject_adapter_in_model(config, reference, adapter_name=ADAPTER)
    for module in adapter.modules:
        scale = reference.get_submodule(module.name).scaling[ADAPTER]
        assert unet.get_submodule(module.name).scaling[ADAPTER] == pytest.approx(scale) == 2
        assert module.alpha == pytest.approx(18)  # a loader divides it by the rank


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_weights_is_known_without_the_network(base, kind):
    unet = load_unet(base, CPU, torch.float32)
    settings = LoraSettings(**({"lora_rank": 4, "lora_conv_rank": 3} | KINDS[kind]))
    shapes = weight_shapes(unet)
    counted = sum(count_weights(shapes[name], layer.rank, settings) for name, layer in adapted_layers(shapes, settings).items())
    assert inject(unet, settings, seed=0).weights.numel() == counted


def shapes_of_sdxl() -> dict[str, tuple[int, ...]]:
    """The layers that ComfyUI's list has of the UNet, with their sizes."""
    with COMFYUI_MODULES.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["part"] == "unet"]
    kernels = {"conv1": (3, 3), "conv2": (3, 3), "conv": (3, 3), "conv_shortcut": (1, 1), "conv_in": (3, 3), "conv_out": (3, 3)}
    sizes = {row["diffusers_module"]: (int(row["out_features"]), int(row["in_features"])) for row in rows}
    return {name: (*size, *kernels.get(name.rpartition(".")[2], ())) for name, size in sizes.items()}


def ranks(**settings) -> dict[str, tuple[int, float]]:
    layers = adapted_layers(shapes_of_sdxl(), LoraSettings(**settings))
    return {name: (layer.rank, layer.alpha) for name, layer in layers.items()}


def test_convolutions_are_the_38_of_resnets_and_samplers():
    chosen = ranks(lora_conv_rank=8)
    convolutions = {name: rank for name, rank in chosen.items() if ".attentions." not in name}
    assert len(chosen) == 722 + 38
    assert set(convolutions.values()) == {(8, 8.0)}
    assert sum("samplers" in name for name in convolutions) == 4
    assert sum(name.endswith((".conv1", ".conv2")) for name in convolutions) == 34
    assert len(ranks()) == 722
    assert len(ranks(lora_targets="attention", lora_conv_rank=4)) == 560 + 38


def test_a_pattern_gives_ranks_and_alphas_and_leaves_layers_out():
    chosen = ranks(lora_rank_pattern=r"attn2=64:16 ff=0 up_blocks\.0=8 mid_block=4", lora_rank=32)
    assert len(chosen) == 722 - 140
    assert all(rank == (64, 16.0) for name, rank in chosen.items() if ".attn2." in name)  # the first that is found decides
    assert all(rank == (8, 8.0) for name, rank in chosen.items() if name.startswith("up_blocks.0") and ".attn2." not in name)
    assert all(rank == (32, 32.0) for name, rank in chosen.items() if name.startswith("down_blocks.1") and ".attn2." not in name)
    assert set(ranks(lora_rank_pattern="attn1=4", lora_alpha=2.0).values()) == {(4, 2.0), (32, 2.0)}


def test_a_pattern_may_use_the_names_of_kohya_and_anchors():
    by_kohya = ranks(lora_rank_pattern=r"output_blocks_[0-2]_1=16 .=0")
    assert by_kohya == ranks(lora_rank_pattern=r"^up_blocks\.0\.attentions=16 .=0")
    assert len(by_kohya) == 3 * 102
    assert set(by_kohya.values()) == {(16, 16.0)}
    assert len(ranks(lora_rank_pattern=r"to_q$=8 ^=0")) == 140


def test_what_a_pattern_does_not_mean_is_refused():
    with pytest.raises(SettingsError, match=r"no adapted layer's name contains 'conv1', 'attn3'; convolutions have a rank with"):
        ranks(lora_rank_pattern="attn1=8 conv1=4 attn3=2")
    with pytest.raises(SettingsError, match=r"contains 'lora_te1'; text encoders are adapted with TRAIN_TEXT_ENCODERS=true only"):
        ranks(lora_rank_pattern="lora_te1=4")
    with pytest.raises(SettingsError, match=r"'attn2.to_k' decides nothing, because each of its layers matches an expression bef"):
        ranks(lora_rank_pattern="attn2=4 attn2.to_k=8")
    with pytest.raises(SettingsError, match="leaves out every layer"):
        ranks(lora_rank_pattern=".=0")
    with pytest.raises(ModelError, match="no transformer blocks"):
        adapted_layers({"conv_in": (320, 4, 3, 3)}, LoraSettings())


@pytest.mark.parametrize(
    "item", ["attn2", "=8", "attn2=", "attn2=x", "attn2=8:", "attn2=8:x", "attn2=-1", "attn2=1025", "a=8:0", "a=8:9e9"]
)
def test_what_cannot_be_read_as_a_rank_is_one_line(item):
    problems = list(LoraSettings(lora_rank_pattern=f"ff=4 {item}").validate())
    assert problems == [
        f"lora_rank_pattern: {item!r} must be EXPRESSION=RANK or EXPRESSION=RANK:ALPHA, such as attn2=64 or ff=16:8"
    ]


def test_combinations_that_are_not_possible_are_one_line_each():
    (problem,) = LoraSettings(lora_rank_pattern="(=4").validate()
    assert problem.startswith("lora_rank_pattern: '(' is not a regular expression (missing )")
    problems = list(LoraSettings(lora_type="loha", lora_dropout=0.1, lokr_factor=8).validate())
    assert problems == [
        "lora_dropout: LORA_TYPE=loha has no dropout; set LORA_DROPOUT=0, or LORA_TYPE=lora",
        "lokr_factor is for LORA_TYPE=lokr (is loha); set LOKR_FACTOR=auto",
    ]
    assert not list(LoraSettings(lora_rank_pattern=" attn2=64:0.5\n(?=ff)=0  a{1,2}=3:12. ").validate())
