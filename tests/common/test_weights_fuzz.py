"""Whatever the header of a `.safetensors` file holds: it is read as safetensors reads it, or one ModelError names the file."""

import json
import struct
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from common.errors import ModelError
from common.weights import read_header

TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
sizes = st.integers(-2, 20) | st.sampled_from([2**31, 2**63, 2**64, 10**30])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "I64", "F8_E4M3"]) | values,
        "shape": st.lists(sizes, max_size=3) | values,
        "data_offsets": st.lists(sizes, min_size=2, max_size=2) | values,
    }
)
headers = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__", "\ud800"]) | st.text(max_size=4), entries | st.just(TENSOR) | values, max_size=4
)
contents = headers.map(lambda header: json.dumps(header).encode()) | st.binary(max_size=60).map(lambda tail: b"{" + tail)


def write(path: Path, header: bytes, data: bytes = bytes(8), length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("headers") / "model.safetensors"


@given(header=contents, data=st.binary(max_size=16), length=st.none() | st.integers(0, 200) | st.just(2**64 - 1))
@example(header=json.dumps({"a": TENSOR}).encode(), data=bytes(8), length=None)
@example(header=json.dumps({"a": TENSOR, "__metadata__": {"epoch": 5}}).encode(), data=bytes(8), length=None)
@example(header=json.dumps({"a": TENSOR | {"shape": [9] * 100_000}}).encode(), data=bytes(8), length=None)
@example(header=b'{"a":' * 100_000, data=b"", length=None)
@example(header=b'{"a": ' + b"9" * 5000 + b"}", data=b"", length=None)
@example(header=json.dumps({"a": TENSOR}).encode("utf-16-le"), data=bytes(8), length=None)
@pytest.mark.fuzz
def test_every_header_is_read_or_refused_in_one_line(file, header, data, length):
    write(file, header, data, length)
    try:
        found = read_header(file)
    except ModelError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert refusal.startswith(f"{file}: ")
        assert "\n" not in refusal
        assert len(refusal) < 500
    elif all(tensor.dtype in ("F32", "F16", "I64", "F8_E4M3") for tensor in found.tensors.values()):
        try:
            with safe_open(file, "pt") as opened:
                assert set(opened.keys()) == found.tensors.keys()
                assert (opened.metadata() or {}) == found.metadata
        except SafetensorError as refusal:
            raise AssertionError(f"LoRACat accepts what safetensors refuses: {header!r}") from refusal


@pytest.mark.parametrize(
    ("value", "described"),
    [(5, "a number"), (None, "null"), (True, "a truth value"), ([1], "a list"), ({"a": 1}, "an object"), (0.5, "a number")],
)
def test_metadata_of_another_type_is_named_with_its_key(tmp_path, value, described):
    header = json.dumps({"a": TENSOR, "__metadata__": {"format": "pt", "epoch": value}}).encode()
    with pytest.raises(ModelError, match=rf"edited.safetensors: its metadata holds {described} under 'epoch'.*save it again"):
        read_header(write(tmp_path / "edited.safetensors", header))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": 5}, "the entry of 'a' is not"),
        ({"dtype": ["F32"]}, "the entry of 'a' is not"),
        ({"shape": 2}, "the entry of 'a' is not"),
        ({"shape": [-2, -1]}, "the entry of 'a' is not"),
        ({"shape": [2.0]}, "the entry of 'a' is not"),
        ({"shape": [True, 2]}, "the entry of 'a' is not"),
        ({"data_offsets": [0, 2**63]}, "the entry of 'a' is not"),
        ({"data_offsets": [-8, 0]}, "the entry of 'a' is not"),
        ({"data_offsets": [0]}, "the entry of 'a' is not"),
        ({"data_offsets": [8, 0]}, "the offsets of 'a' do not match"),
        ({"shape": [3]}, "the offsets of 'a' do not match"),
        ({"data_offsets": [8, 16]}, "'a' does not begin where"),
    ],
)
def test_wrong_entries_say_what_is_wrong(tmp_path, changes, reason):
    with pytest.raises(ModelError, match=f"its header is damaged .*{reason}.*download it again"):
        read_header(write(tmp_path / "a.safetensors", json.dumps({"a": TENSOR | changes}).encode()))


def test_a_folder_or_a_pipe_with_the_name_of_weights_is_refused(tmp_path):
    for file in (tmp_path, Path("/dev/zero")):
        with pytest.raises(ModelError, match="is not a regular file"):
            read_header(file)
