"""Finding a base model and its tokenizers without a network, and the digests that identify them."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from base_models import change_json, refusal
from safetensors.torch import load_file, save_file

from common.clip_tokens import find_vocabulary
from common.errors import ModelError
from common.weights import digest
from demo import tiny_sdxl as miniature
from training.models import base_model
from training.models.base_model import find_base
from training.models.weights import load_tokenizers


def test_a_name_in_models_dir_finds_folder_and_file(tiny_sdxl, tiny_single_file):
    assert find_base(tiny_sdxl.name, tiny_sdxl.parent).path == tiny_sdxl
    assert find_base("tiny-sdxl", tiny_single_file.parent).path == tiny_single_file
    assert find_base(tiny_single_file.name, tiny_single_file.parent).name == "tiny-sdxl"


def test_a_relative_path_is_one_from_the_current_folder_or_the_repository(tiny_sdxl, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_sdxl.parent)
    assert find_base(f"./{tiny_sdxl.name}", tmp_path).path.resolve() == tiny_sdxl.resolve()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("common.settings.REPOSITORY", tiny_sdxl.parent)
    assert find_base(f"./{tiny_sdxl.name}", tmp_path).path == tiny_sdxl
    assert find_vocabulary(tmp_path, f"./{tiny_sdxl.name}")
    assert find_vocabulary(tmp_path, "./absent") == {}


@pytest.mark.parametrize("name", ["owner/some-XL", "https://huggingface.co/owner/some-XL", "https://hf.co/owner/some-XL/"])
@pytest.mark.parametrize("folder", ["some-XL", "owner/some-XL"])
def test_a_repository_is_found_where_its_download_command_puts_it(tiny_sdxl, tmp_path, name, folder):
    with pytest.raises(ModelError, match=f"hf download owner/some-XL --local-dir {tmp_path}/some-XL "):
        find_base(name, tmp_path)
    (tmp_path / folder).parent.mkdir(exist_ok=True)
    (tmp_path / folder).symlink_to(tiny_sdxl)
    assert find_base(name, tmp_path).path == tmp_path / folder


def test_missing_base_model_names_the_download_command(tmp_path):
    message = refusal(Path("stable-diffusion-xl-base-1.0"), tmp_path)
    assert f"neither in {tmp_path} nor a path" in message
    assert f"--local-dir {tmp_path}/stable-diffusion-xl-base-1.0 " in message
    with pytest.raises(ModelError, match=f"hf download Laxhar/noobai-XL-1.1 --local-dir {tmp_path}/noobai-XL-1.1 .*'unet/\\*'"):
        find_base("Laxhar/noobai-XL-1.1", tmp_path)


def test_tokenizers_of_a_file_are_downloaded_once_into_models_dir(tiny_single_file, tiny_sdxl, tmp_path, monkeypatch, capsys):
    downloaded = []

    def fake_download(repository, file, local_dir):
        assert repository == "stabilityai/stable-diffusion-xl-base-1.0"
        downloaded.append(file)
        (local_dir / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny_sdxl / file, local_dir / file)

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url: SimpleNamespace(size=1))  # the file exists
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fake_download)
    base = find_base(str(tiny_single_file), tmp_path)
    assert base_model.find_tokenizers(base, tmp_path) is None
    for _ in range(2):
        first, second = load_tokenizers(base, tmp_path)
        assert (first.pad_token_id, second.pad_token_id) == (526, 0)
    assert len(downloaded) == 8
    assert "downloading the tokenizers" in capsys.readouterr().out


@pytest.mark.parametrize("unreachable_call", ["get_hf_file_metadata", "hf_hub_download"])
def test_tokenizers_of_a_file_without_a_network(tiny_single_file, tmp_path, monkeypatch, unreachable_call):
    """From the start, or from the first download on."""

    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url: SimpleNamespace(size=1))
    monkeypatch.setattr(f"huggingface_hub.{unreachable_call}", unreachable)
    with pytest.raises(ModelError) as caught:
        load_tokenizers(find_base(str(tiny_single_file), tmp_path), tmp_path)
    assert caught.value.exit_code == 5
    command = (
        f"hf download stabilityai/stable-diffusion-xl-base-1.0 --local-dir {tmp_path}/sdxl-tokenizers --include 'tokenizer*/*'"
    )
    assert command in str(caught.value)


def test_tokenizers_with_another_vocabulary_are_skipped(tiny_single_file, folder):
    change_json(folder / "tokenizer" / "vocab.json", another=527)
    assert base_model.find_tokenizers(find_base(str(tiny_single_file), folder), folder.parent) is None


def test_digest_of_tokenizers_follows_what_decides_the_tokens(folder):
    before = base_model.tokenizers_digest(folder)
    assert base_model.tokenizers_digest(folder) == before
    merges = folder / "tokenizer_2" / "merges.txt"
    merges.write_text(merges.read_text().replace("s m\n", "m s\n"))
    assert base_model.tokenizers_digest(folder) != before


def test_digest_follows_the_weights(folder, tiny_sdxl, tiny_single_file):
    def digests(path):
        return {name: component.digest for name, component in find_base(str(path), folder).components.items()}

    before = digests(tiny_sdxl)
    assert digests(folder) == before
    assert len(set(digests(tiny_single_file).values())) == 4
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["encoder.conv_in.bias"][0] += 1
    save_file(weights, file)
    after = digests(folder)
    assert after.pop("vae") != before.pop("vae")
    assert after == before


def test_a_digest_is_remembered_until_its_file_changes(stage, tiny_sdxl, tmp_path, monkeypatch):
    copied, kept = tmp_path / "base", tmp_path / "output"
    shutil.copytree(tiny_sdxl, copied)
    (file,) = (copied / "vae").glob("*.safetensors")
    computed = []

    def hashed(files):
        computed.append(1)
        return digest(files)

    monkeypatch.setattr("training.models.sdxl.digest", hashed)

    def digest_now() -> str:
        return base_model.base_digest(find_base(str(copied), tmp_path), kept, "vae")

    first = digest_now()
    assert [digest_now(), len(computed)] == [first, 1]
    base_model.compute_digests(find_base(str(copied), tmp_path), kept)
    assert len(computed) == 4  # the other three components
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    changed = digest_now()
    assert changed != first
    for damage in ("{ half a", "[1, 2]", "[]", "null", "5", '{"a":' * 100_000):
        (kept / base_model.DIGESTS).write_text(damage)
        assert digest_now() == changed
    remembered = json.loads((kept / base_model.DIGESTS).read_text())
    (kept / base_model.DIGESTS).write_text(json.dumps(dict.fromkeys(remembered, 5)))
    assert digest_now() == changed
    assert len(computed) == 12


def test_demo_is_reproducible_and_small(tmp_path, tiny_sdxl):
    again = miniature.build(tmp_path / "again")
    files = sorted(path.relative_to(tiny_sdxl) for path in tiny_sdxl.rglob("*") if path.is_file())
    assert all((again / file).read_bytes() == (tiny_sdxl / file).read_bytes() for file in files)
    assert sum((again / file).stat().st_size for file in files) < 30e6
    other = load_file(miniature.build(tmp_path / "other", seed=1) / "vae" / "diffusion_pytorch_model.safetensors")
    assert not torch.equal(
        other["quant_conv.weight"], load_file(again / "vae" / "diffusion_pytorch_model.safetensors")["quant_conv.weight"]
    )
