"""Profiles as files: what is written is read again, and what is damaged or not for here is ignored with a reason."""

import json
import os
import sys

import pytest
import torch

import fusedrnn
from fusedrnn.tuning import machine, profile
from fusedrnn.tuning.profile import Key, Measurement, Profile, ProfileError, Ratio

VERSIONS = {"fusedrnn": fusedrnn.__version__, "torch": torch.__version__}
HERE = machine.here("cpu")
KEYS = [
    Key("float32", True, 64, 16, 256, 256),
    Key("bfloat16", False, 1, 1, 3, 5, step=True),
    Key("tf32", False, 7, 2, 3, 5, 2, 2, packed=True, projected=True),
    Key("float16", True, 7, 2, 3, 5, cell="gru"),
]


def made(*keys, **changes):
    measurements = [Measurement(key, {"aten": 2.0, "cpu": 1.0}, {"cpu": Ratio(1.5, 2.0)}, {}, 9) for key in keys]
    return Profile(changes.pop("here", HERE), changes.pop("threads", 2), VERSIONS | changes).with_added(measurements)


def find(threads=2):
    sources, ignored = profile.find(HERE, threads, VERSIONS)
    return [(source.path.name, source.origin) for source in sources], {
        os.path.basename(path): reason for path, reason in ignored.items()
    }


# The file.


def test_what_is_written_is_read_again(tmp_path):
    failed = Measurement(KEYS[0]._replace(B=64), failures={"cpu": "hung: no answer within 3 seconds"})
    before = made(*KEYS).with_added([failed])
    profile.save(before, tmp_path / "deep" / "p.json")
    assert profile.load(tmp_path / "deep" / "p.json") == before
    assert os.listdir(tmp_path / "deep") == ["p.json"]


def test_one_measurement_is_one_line(tmp_path):
    profile.save(made(*KEYS), tmp_path / "p.json")
    lines = [
        json.loads(line.rstrip(",")) for line in (tmp_path / "p.json").read_text().splitlines() if '"cell"' in line
    ]
    assert len(lines) == len(KEYS)
    assert {"cell", "dtype", "mode", "T", "B", "I", "H", "L", "D", "ms", "ratio", "samples"} <= lines[0].keys()


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "p.json"
    profile.save(made(KEYS[0]), path)
    before = path.read_text()

    def full(self, *args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(profile.Path, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        profile.save(made(*KEYS), path)
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["p.json"]


def line(**changes):
    return {**profile.to_line(Measurement(KEYS[0], {"aten": 2.0}, {"cpu": Ratio(1.0, 2.0)})), **changes}


def document(**changes):
    document = {"format": profile.FORMAT, "version": profile.VERSION, "threads": 2, "provenance": {"torch": "2"}}
    document |= {"machine": {"device": "cpu", "family": "f", "model": "m", "name": "n"}, "measurements": [line()]}
    return {name: value for name, value in {**document, **changes}.items() if value is not ...}


DAMAGED = {
    "empty": ("", "it is damaged"),
    "cut off": (json.dumps(document())[:-20], "it is damaged"),
    "no text": (b"\xff\xfe\x00", "it is damaged"),
    "a list": ("[]", "it is no profile"),
    "something else": ('{"name": "x"}', "it is no profile"),
    "a later version": (json.dumps(document(version=99)), "version 99"),
    "no version": (json.dumps(document(version=...)), "version None"),
    "no machine": (json.dumps(document(machine=...)), "KeyError: 'machine'"),
    "half a machine": (json.dumps(document(machine={"device": "cpu"})), "KeyError: 'family'"),
    "threads": (json.dumps(document(threads=0)), "whole number from 1, got 0"),
    "provenance": (json.dumps(document(provenance=[])), "it is damaged"),
    "no measurements": (json.dumps(document(measurements=3)), "it is damaged"),
    "a size": (json.dumps(document(measurements=[line(B=0)])), "whole number from 1, got 0"),
    "a size that is text": (json.dumps(document(measurements=[line(H="x")])), "whole number from 1, got 'x'"),
    "a mode": (json.dumps(document(measurements=[line(mode="fast")])), "mode 'fast'"),
    "a ratio": (json.dumps(document(measurements=[line(ratio={"cpu": [0.0, 1.0]})])), "positive number, got 0.0"),
    "half a ratio": (json.dumps(document(measurements=[line(ratio={"cpu": [1.0]})])), "it is damaged"),
    "a time": (json.dumps(document(measurements=[line(ms={"aten": "fast"})])), "positive number, got 'fast'"),
    "not a number": (json.dumps(document(measurements=[line(ms={"aten": float("nan")})])), "positive number, got nan"),
    "failures": (json.dumps(document(measurements=[line(failures=[1])])), "it is damaged"),
    "a line": (json.dumps(document(measurements=[7])), "it is damaged"),
}


@pytest.mark.parametrize(("content", "reason"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_ignored_with_a_reason(cache, content, reason):
    cache.mkdir()
    (cache / "p.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    found, ignored = find()
    assert found == []
    assert reason in ignored["p.json"]


def test_a_correct_document_is_no_damaged_one(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(document()))
    assert profile.load(tmp_path / "p.json").machine.family == "f"


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ProfileError, match="cannot be read"):
        profile.load(tmp_path / "missing.json")
    with pytest.raises(ProfileError, match="cannot be read"):
        profile.load(tmp_path)


# Places.


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/fusedrnn/profiles"),
        ("linux", {"HOME": "/home/me"}, "/home/me/.cache/fusedrnn/profiles"),
        ("darwin", {"HOME": "/Users/me", "XDG_CACHE_HOME": "/x"}, "/Users/me/Library/Caches/fusedrnn/profiles"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/fusedrnn/profiles"),
        ("linux", {"FUSEDRNN_CACHE_DIR": "/mine", "XDG_CACHE_HOME": "/x"}, "/mine/profiles"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="paths as POSIX has them")
def test_the_cache_folder_is_where_the_platform_has_it(monkeypatch, platform, variables, expected):
    for name in ("FUSEDRNN_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert str(profile.cache_folder()) == expected


def test_without_a_home_there_is_no_profile_and_no_error(monkeypatch, cache):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    for name in ("FUSEDRNN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(profile.Path, "home", homeless)
    assert find() == ([], {})


def test_the_users_own_counts_before_a_shipped_one(cache):
    profile.save(made(KEYS[0]), cache / "own.json")
    profile.save(made(KEYS[0]), profile.SHIPPED / "shipped.json")
    assert find() == ([("own.json", "own"), ("shipped.json", "shipped")], {})


def test_the_number_of_threads_counts_before_that(cache):
    profile.save(made(KEYS[0], threads=8), cache / "own.json")
    profile.save(made(KEYS[0], threads=2), profile.SHIPPED / "shipped.json")
    assert [name for name, _ in find(threads=2)[0]] == ["shipped.json", "own.json"]
    assert [name for name, _ in find(threads=16)[0]] == ["own.json", "shipped.json"]


def test_another_machine_is_another_machine(cache):
    other = machine.Machine("cpu", HERE.family, HERE.model + "-x", "Other")
    profile.save(made(KEYS[0], here=other), cache / "own.json")
    profile.save(made(KEYS[0], here=other), profile.SHIPPED / "same-class.json")
    profile.save(made(KEYS[0], here=machine.Machine("cpu", "z80-none", "z80", "Z80")), profile.SHIPPED / "foreign.json")
    profile.save(made(KEYS[0], here=machine.Machine("cuda", HERE.family, "m", "n")), profile.SHIPPED / "gpu.json")
    assert find() == ([("same-class.json", "shipped")], {})


def test_a_users_profile_of_another_version_is_ignored_and_says_what_to_do(cache):
    profile.save(made(KEYS[0], fusedrnn="0.0.1"), cache / "own.json")
    profile.save(made(KEYS[0], fusedrnn="0.0.1", torch="1.0"), profile.SHIPPED / "shipped.json")
    found, ignored = find()
    assert found == [("shipped.json", "shipped")]
    assert "fusedrnn 0.0.1" in ignored["own.json"]
    assert "tune again" in ignored["own.json"]
    assert "with torch 1.0" in profile.find(HERE, 2, VERSIONS)[0][0].note


def test_none_is_none(cache, monkeypatch):
    profile.save(made(KEYS[0]), cache / "own.json")
    monkeypatch.setenv("FUSEDRNN_PROFILE", "none")
    assert find() == ([], {})


def test_a_pinned_file_counts_alone_and_whatever_it_was_measured_on(cache, monkeypatch, tmp_path):
    profile.save(made(KEYS[0]), cache / "own.json")
    foreign = machine.Machine("cpu", "z80-none", "z80", "Z80")
    profile.save(made(KEYS[0], here=foreign, fusedrnn="0.0.1"), tmp_path / "pinned.json")
    monkeypatch.setenv("FUSEDRNN_PROFILE", f"{tmp_path / 'pinned.json'}{os.pathsep}{tmp_path / 'missing.json'}")
    found, ignored = find()
    assert found == [("pinned.json", "pinned")]
    assert "cannot be read" in ignored["missing.json"]
    assert f"this is {HERE.family}" in str(profile.find(HERE, 2, VERSIONS)[0][0])


def test_a_damaged_profile_neither_stops_an_import_nor_a_call(report, tmp_path, monkeypatch):
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "p.json").write_text("{")
    monkeypatch.setenv("FUSEDRNN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FUSEDRNN_PROFILE", raising=False)
    code = """
import json, torch, fusedrnn
y, _ = fusedrnn.LSTM(300, 8)(torch.randn(20, 20, 300))
print(json.dumps(list(y.shape)))
"""
    assert report(code, tmp_path) == [20, 20, 8]


def test_shipped_profiles_are_read_and_are_of_machines_that_say_so():
    for path in sorted((profile.Path(profile.__file__).parent / "profiles").glob("*.json")):
        shipped = profile.load(path)
        assert path.name.startswith(shipped.machine.family)
        assert {
            "cpu",
            "torch",
            "fusedrnn",
            "date",
            "commit",
        } <= shipped.provenance.keys() or shipped.machine.device == "cuda"
        assert shipped.measurements
        assert not any(m.failures for m in shipped.measurements.values())
