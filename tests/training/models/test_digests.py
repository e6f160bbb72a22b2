"""When a base model is hashed, and when its digests are remembered."""

import json
import shutil

from training.models import base_model
from training.models.base_model import find_base
from training.models.weights import digest


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
    for damage in ("{ half a", "[1, 2]", "[]", "null", "5"):
        (kept / base_model.DIGESTS).write_text(damage)
        assert digest_now() == changed
    remembered = json.loads((kept / base_model.DIGESTS).read_text())
    (kept / base_model.DIGESTS).write_text(json.dumps(dict.fromkeys(remembered, 5)))
    assert digest_now() == changed
    assert len(computed) == 11
