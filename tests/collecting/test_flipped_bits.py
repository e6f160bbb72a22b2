"""Whatever bits are flipped in a file that collecting reads: success, or a documented exit code.

`make test` runs the same few examples each time, `make fuzz` new ones for minutes.
"""

import io
import json

import pytest
from bit_flips import Snapshot, flip, flips
from comfyui_workspace import png, workflow
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from common.dotenv import DotenvError, parse_dotenv
from common.settings import SETTINGS_FILE
from demo.standin_comfyui.server import StandIn

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(3600), pytest.mark.filterwarnings("ignore")]

DOCUMENTED = {0, 1, 2, 3, 4, 5, 6}
PROMPTS = [{"prompt": f"a woman in image {number}", "seed": number, "name": f"x{number}"} for number in range(2)]


@pytest.fixture
def standin(tmp_path):
    with StandIn(tmp_path / "server", seconds_per_job=0.01) as server:
        yield server


def test_one_damaged_file_of_a_collected_data_set_is_read_or_refused(space, collect, tmp_path, monkeypatch):
    monkeypatch.setattr("collecting.http.RETRY_DELAYS_S", (0.0,))
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    space.root = inputs
    space.environment["DATASET_DIR"] = str(space.dataset)
    space.per_batch(PROMPTS)
    space.write("FACE_REFERENCE", "face.png", png())
    (inputs / "settings.toml").write_bytes(SETTINGS_FILE.read_bytes())
    space.environment["COMFYUI_STALL_TIMEOUT"] = "5"
    flags = ("--config", str(inputs / "settings.toml"))
    assert collect(*flags).code == 0
    snapshot = Snapshot([inputs])
    images = space.images()

    @given(path=st.sampled_from(list(snapshot.files)), bits=flips, flag=st.sampled_from([(), ("--check",)]))
    @settings(max_examples=2 * settings.default.max_examples)
    def damage(path, bits, flag):
        snapshot.restore()
        flip(path, bits)
        result = collect(*flags, *flag)
        assert result.code in DOCUMENTED, (path, result.err)
        assert "Traceback" not in result.err
        if path.parent != space.dataset / "images":
            assert {name: space.images()[name] for name in images} == images, path  # nothing that was collected is lost

    damage()


def test_a_damaged_workflow_in_an_image_is_read_or_refused(space, collect, tmp_path):
    texts, content = PngInfo(), io.BytesIO()
    texts.add_text("prompt", json.dumps(workflow("per_batch_ksampler.json")))
    Image.new("RGB", (16, 16)).save(content, "PNG", pnginfo=texts)
    space.per_batch(PROMPTS)

    @given(bits=flips)
    def damage(bits):
        space.write("COMFYUI_WORKFLOW", "workflow.png", content.getvalue())
        flip(tmp_path / "workflow.png", bits)
        result = collect("--check")
        assert result.code in DOCUMENTED, result.err
        assert "Traceback" not in result.err

    damage()


@given(bits=flips)
def test_a_damaged_dotenv_is_read_or_refused(tmp_path, bits):
    file = tmp_path / ".env"
    file.write_text("# a\nA=b\nexport C=\"d ${A:-x} $$\"\nE='f'\nG=${A}${C-y}\nH=\n")
    flip(file, bits)
    refusal = ""
    try:
        assert all(isinstance(value, str) for value in parse_dotenv(file.read_text(encoding="utf-8"), {}).values())
    except (DotenvError, UnicodeDecodeError) as error:
        refusal = str(error)
    assert "\n" not in refusal
