"""The collector and a real ComfyUI. The workflows need no model and run on the CPU.

LORACAT_COMFYUI is a folder with ComfyUI's sources; LORACAT_COMFYUI_COMMAND runs main.py, with the Python of its environment:
`LORACAT_COMFYUI_COMMAND="venv/bin/python main.py"`. Everything here is tested against the stand-in, too.
"""

import io
import itertools
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
from comfyui_workspace import Result, Workspace, png
from PIL import Image

from common.files import read_json_lines
from common.settings import REPOSITORY
from training.method.comfyui_workflow import comfyui_workflow
from training.models.sdxl import Schedule

SOURCES = os.environ.get("LORACAT_COMFYUI")
COMMAND = os.environ.get("LORACAT_COMFYUI_COMMAND", f"{shlex.quote(sys.executable)} main.py")
pytestmark = pytest.mark.skipif(not SOURCES, reason="LORACAT_COMFYUI is not set to a folder with ComfyUI")
KEY = "comfyui-made-up-0123456789abcdef"
AGAIN = "submitting it again"


class Server:
    """ComfyUI as a process, with all its files in `folder`."""

    def __init__(self, folder: Path, custom_nodes: bool = False, **environment: str):
        self.folder, self.custom_nodes, self.environment = folder, custom_nodes, environment
        for name in ("input", "output", "temp", "models", "custom_nodes", "user"):
            (folder / name).mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        arguments = ["--cpu", "--listen", "127.0.0.1", "--port", str(self.port), "--base-directory", str(self.folder)]
        arguments += ["--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
        arguments += [] if self.custom_nodes else ["--disable-all-custom-nodes"]
        command = [os.path.expanduser(part) for part in shlex.split(COMMAND)]
        with (self.folder / "comfyui.log").open("a") as log:
            self.process = subprocess.Popen(
                [*command, *arguments], cwd=SOURCES, stdout=log, stderr=subprocess.STDOUT, env=os.environ | self.environment
            )
        deadline = time.monotonic() + 300
        while not self.answers():
            assert self.process.poll() is None, (self.folder / "comfyui.log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def answers(self) -> bool:
        try:
            return requests.get(f"{self.url}/system_stats", timeout=5).status_code == 200
        except requests.ConnectionError:
            return False

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def post(self, path: str, content: dict) -> requests.Response:
        return requests.post(self.url + path, json=content, timeout=10)

    def get(self, path: str) -> dict:
        return requests.get(self.url + path, timeout=10).json()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("comfyui"))
    started.start()
    yield started
    started.stop()


@pytest.fixture(autouse=True)
def clean(server: Server) -> None:
    server.post("/queue", {"clear": True})
    server.post("/interrupt", {})
    server.post("/history", {"clear": True})
    while server.get("/prompt")["exec_info"]["queue_remaining"]:
        time.sleep(0.1)


@pytest.fixture
def space(tmp_path: Path, server: Server) -> Workspace:
    made = Workspace(tmp_path)
    made.environment |= {"COMFYUI_ENDPOINT": server.url, "COMFYUI_DELAY": "0", "DATASET_DIR": str(made.dataset), "GLOBAL_SEED": ""}
    made.environment |= {"NEW_SEEDS": "", "COMFYUI_FREE": "0"}
    made.write("FACE_REFERENCE", "face.png", png())
    return made


@pytest.fixture
def collect(space: Workspace) -> Callable[..., Result]:
    def run(**variables: str) -> Result:
        process = space.start(**variables)
        out, err = process.communicate(timeout=120)
        assert "Traceback" not in out + err
        return Result(process.returncode, out, err)

    return run


def full_workflow(space: Workspace, colour: int, size: int = 64) -> dict:
    """The face scaled, saved twice under the prefix that is kept and once under another, and a text displayed."""
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "nothing.png"}},
        "2": {"class_type": "ImageScale", "inputs": scaled(["1", 0], size)},
        "3": {"class_type": "EmptyImage", "inputs": {"width": size, "height": size, "batch_size": 1, "color": colour}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": f"kept/{colour}/face"}},
        "5": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": f"kept/{colour}/plain"}},
        "6": {"class_type": "ImageInvert", "inputs": {"image": ["3", 0]}},
        "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": f"else/{colour}/inverted"}},
        "8": {"class_type": "PreviewAny", "inputs": {"source": ["3", 0]}},
    }
    space.write("COMFYUI_WORKFLOW", "workflow.json", graph)
    space.write("WORKFLOW_CONFIG", "config.json", {"image_loader_node": "1", "output_prefix": "kept/"})
    return graph


def scaled(source: list, size: int) -> dict:
    return {"image": source, "upscale_method": "nearest-exact", "width": size, "height": size, "crop": "disabled"}


def slow_graph(number: int) -> dict:
    """A prompt that takes some seconds on a CPU."""
    graph = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 1024, "height": 1024, "batch_size": 8, "color": number}},
        "2": {"class_type": "ImageScale", "inputs": {**scaled(["1", 0], 1536), "upscale_method": "lanczos"}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "busy/x"}},
    }
    return {"prompt": graph, "client_id": "another"}


def test_kept_images_are_collected_with_the_prompt_of_comfyui_in_them(space, server, collect):
    graph = full_workflow(space, 0x102030)
    result = collect(COMFYUI_API_KEY=KEY)
    assert (result.code, result.err) == (0, "")
    assert [line["node"] for line in space.manifest()] == ["4", "5"]
    for line in space.manifest():
        with Image.open(space.dataset / line["file"]) as image:
            embedded = json.loads(image.text["prompt"])
            assert "workflow" not in image.text
        assert {node_id: node["class_type"] for node_id, node in embedded.items()} == {
            node_id: node["class_type"] for node_id, node in graph.items()
        }
        assert embedded[line["node"]]["inputs"] == graph[line["node"]]["inputs"]
    written = [path for folder in (space.dataset, server.folder / "output") for path in folder.rglob("*") if path.is_file()]
    assert not any(KEY.encode() in path.read_bytes() for path in written)
    assert KEY not in result.out
    assert KEY not in json.dumps(server.get("/history"))


def test_only_kept_nodes_and_displays_run(space, server, collect):
    full_workflow(space, 0x112233)
    assert collect().code == 0
    (entry,) = server.get("/history").values()
    assert entry["outputs"].keys() == {"4", "5", "8"}
    assert not (server.folder / "output" / "else" / str(0x112233)).exists()


def test_finished_collection_sends_nothing(space, server, collect):
    full_workflow(space, 0x102131)
    assert collect().code == 0
    server.post("/history", {"clear": True})
    assert collect().code == 0
    assert server.get("/history") == {}


def test_cached_answer_without_its_file_is_made_again(space, server, collect):
    full_workflow(space, 0x445566)
    assert collect().code == 0
    (deleted,) = (server.folder / "output" / "kept" / str(0x445566)).glob("plain*")
    deleted.unlink()
    again = Workspace(space.root / "again", space.environment | {"DATASET_DIR": str(space.root / "again" / "dataset")})
    result = collect(**again.environment)
    assert result.code == 0
    assert "the files are gone; submitting it again" in result.out
    assert sorted(line["node"] for line in again.manifest()) == ["4", "5"]
    assert again.images() == space.images()


def test_refusal_names_the_input_and_leaves_no_trail(space, server, collect):
    graph = full_workflow(space, 0x778899)
    graph["2"]["inputs"]["width"] = graph["3"]["inputs"]["width"] = -5
    space.write("COMFYUI_WORKFLOW", "workflow.json", graph)
    for _ in range(2):
        result = collect()
        assert result.code == 4
        assert "node 2 (ImageScale)" in result.err
        assert AGAIN not in result.out + result.err
        assert "Removed this run's" not in result.out


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def waiting(server: Server, client: bool = True) -> list[str]:
    pending = server.get("/queue")["queue_pending"]
    return [item[1] for item in pending if (item[3].get("client_id") != "another") == client]


def test_stop_removes_the_waiting_prompt_and_the_next_run_continues(space, server):
    full_workflow(space, 0x121212)
    for number in range(4):
        server.post("/prompt", slow_graph(number))
    process = space.start()
    wait_for(lambda: waiting(server))
    wait_for(lambda: any(each["event"] == "sent" for each in read_json_lines(space.dataset / ".loracat" / "collect.jsonl")))
    process.terminate()
    out, err = process.communicate(timeout=20)
    assert process.returncode == 143
    assert "Removed this run's waiting prompts from the queue" in out
    assert waiting(server) == []
    server.post("/queue", {"clear": True})
    process = space.start()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert AGAIN not in out
    assert len(space.images()) == 2


def test_prompt_deleted_from_the_queue_stays_deleted(space, server):
    full_workflow(space, 0x131313)
    for number in range(10, 16):
        server.post("/prompt", slow_graph(number))
    process = space.start()
    wait_for(lambda: waiting(server))
    time.sleep(3)  # until the collector has seen it waiting
    server.post("/queue", {"delete": waiting(server)})
    out, err = process.communicate(timeout=60)
    assert process.returncode == 4
    assert "its prompt was removed from ComfyUI's queue" in out
    assert AGAIN not in out + err


def test_server_that_is_killed_and_started_again_loses_nothing(space, server):
    full_workflow(space, 0x141414)
    for number in range(20, 24):
        server.post("/prompt", slow_graph(number))
    process = space.start()
    wait_for(lambda: waiting(server))
    server.stop()
    server.start()
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert "Reconnected" in out
    assert len(space.images()) == 2


def test_face_larger_than_the_limit_is_refused_by_comfyui(server):
    """The limit of /features is the one that the server applies: to the body of a request."""
    limit = server.get("/features")["max_upload_size"]
    files = {"image": ("large.png", io.BytesIO(bytes(limit)), "image/png")}
    assert requests.post(f"{server.url}/upload/image", files=files, timeout=60).status_code == 413


QWEN, Z_IMAGE = "qwen_image_edit_2509_fp8_e4m3fn_scaled.safetensors", "z_image_turbo_bf16.safetensors"
QWEN_TEXT, Z_IMAGE_TEXT = "qwen_2.5_vl_7b_fp8_scaled.safetensors", "qwen_3_4b.safetensors"
QWEN_2511 = "qwen_image_edit_2511_fp8mixed.safetensors"
MODEL_FILES = {
    "diffusion_models": (QWEN, Z_IMAGE, QWEN_2511),
    "text_encoders": (QWEN_TEXT, Z_IMAGE_TEXT),
    "vae": ("qwen_image_vae.safetensors", "ae.safetensors"),
    "loras": tuple(f"Qwen-Image-Edit-{version}-Lightning-4steps-V1.0-bf16.safetensors" for version in (2509, 2511)),
}


@pytest.mark.parametrize("hash_seed", ["1", "2", "3"])
@pytest.mark.parametrize(
    ("folder", "mapping", "models"),
    [
        (".", "config", [QWEN_TEXT, QWEN, Z_IMAGE_TEXT, Z_IMAGE]),
        ("workflows/qwen_image_edit_2511", "workflows/qwen_image_edit_2511", [QWEN_TEXT, QWEN_2511]),
    ],
    ids=["default", "2511"],
)
def test_the_included_workflows_load_each_large_model_once(tmp_path, hash_seed, folder, mapping, models):
    """ComfyUI's order of work follows Python's hash seed."""
    log = tmp_path / "models.log"
    server = Server(tmp_path / "comfyui", custom_nodes=True, MODEL_LOG=str(log), PYTHONHASHSEED=hash_seed)
    pack = Path(__file__).parents[1] / "data/comfyui/models_of_nothing"
    shutil.copytree(pack, server.folder / "custom_nodes" / pack.name)
    for kind, names in MODEL_FILES.items():
        (server.folder / "models" / kind).mkdir()
        for name in names:
            (server.folder / "models" / kind / name).touch()
    server.start()
    try:
        (tmp_path / "project").mkdir()
        space = Workspace(tmp_path / "project")
        space.environment |= {"COMFYUI_ENDPOINT": server.url, "COMFYUI_DELAY": "0", "DATASET_DIR": str(space.dataset)}
        space.environment |= {"COMFYUI_FREE": "0", "COMFYUI_WORKFLOW": str(REPOSITORY / folder / "workflow_api.json")}
        space.environment |= {"WORKFLOW_CONFIG": str(REPOSITORY / mapping / "workflow_config.json"), "GLOBAL_SEED": ""}
        space.write("FACE_REFERENCE", "face.png", png())
        process = space.start()
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, out + err
    finally:
        server.stop()
    assert len(space.images()) == 48
    uses = [line.split()[-1] for line in log.read_text().splitlines() if line.startswith(("sample ", "encode q"))]
    loaded = [model for model, _ in itertools.groupby(uses)]
    assert sorted(loaded) == sorted(models)  # each once; the encoders of both stages may come first


def test_the_workflow_with_the_recommended_lora_is_accepted(server):
    """ComfyUI only looks for the names of the models before it runs a workflow; their content is not an SDXL model here."""
    for folder, name in (("checkpoints", "my-sdxl"), ("loras", "mia-recommended")):
        path = server.folder / "models" / folder / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    for schedule in (Schedule(), Schedule(prediction_type="v_prediction", zero_terminal_snr=True)):
        how = "mia-recommended.safetensors", 0.8, "my-sdxl", schedule, "mia", "mia", 1024, 6.0, 7
        answer = server.post("/prompt", {"prompt": comfyui_workflow(*how)})
        assert (answer.status_code, answer.json()["node_errors"]) == (200, {})
        wrong = server.post("/prompt", {"prompt": comfyui_workflow("gone.safetensors", *how[1:])})
        assert wrong.json()["node_errors"].keys() == {"2"}
