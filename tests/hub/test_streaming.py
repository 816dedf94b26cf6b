"""``apply`` of a model on the Hub: the same bytes, shard by shard, with the disk of the output and a few shards."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import constants, snapshot_download
from jsonschema import Draft202012Validator

import tensorsurgeon as ts
from tensorsurgeon import api
from tensorsurgeon.checkpoint.hub.stays import Stays
from tensorsurgeon.cli import main
from tensorsurgeon.cli.schema import SCHEMAS
from tensorsurgeon.errors import Interrupted, JournalError, SourceError, TargetError
from tests.checkpoints import FIXTURE, tiny_moe, write_checkpoint
from tests.hub.conftest import use
from tests.hub.conversions import contents, convert, fetched_once, in_shards, shard_names, watched
from tests.hub.server import Hub

TRANSFORMS = ["quark-w8a8-int8", "ct-w4a16-g32", "split-experts"]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("workers", [1, 4])
def test_the_bytes_are_those_of_a_folder(hub: Hub, tmp_path: Path, transform: str, workers: int) -> None:
    hub.storage.add_model("owner/tiny", FIXTURE)
    convert(transform, FIXTURE, tmp_path / "local", workers=workers)
    convert(transform, "owner/tiny", tmp_path / "streamed", workers=workers)
    assert contents(tmp_path / "streamed") == contents(tmp_path / "local")
    assert not (tmp_path / "streamed" / ".surgeon").exists()
    fetched_once(hub, shard_names(FIXTURE))


def test_the_record_names_the_commit_and_what_each_shard_was(hub: Hub, tmp_path: Path) -> None:
    repository = hub.storage.add_model("owner/tiny", FIXTURE)
    convert("split-experts", "owner/tiny", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "surgeon.json").read_text())["source"]["hub"]
    files = repository.files()
    assert found == {
        "repository": "owner/tiny",
        "revision": "main",
        "commit": repository.refs["main"],
        "shards": {name: f"sha256:{files[name].sha256}" for name in shard_names(FIXTURE)},
    }
    assert api.verify(tmp_path / "out", against="owner/tiny").is_sound


@pytest.mark.parametrize("ahead", [1, 2, 4])
def test_disk_is_the_output_and_a_few_shards(hub: Hub, tmp_path: Path, ahead: int) -> None:
    folder = in_shards(tmp_path / "model")
    hub.storage.add_model("owner/large", folder)
    hub.seconds_per_mb = 0.05
    plan = api.plan("split-experts", "owner/large")
    with watched(tmp_path / "out") as seen:
        api.apply(plan, tmp_path / "out", ahead=ahead, workers=2)
    largest = max(p.stat().st_size for p in folder.glob("*.safetensors"))
    output = sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    assert 1 <= seen["shards"] <= ahead + 1
    assert seen["bytes"] <= output + (ahead + 1) * largest + (256 << 10)
    fetched_once(hub, shard_names(folder))


def test_the_plan_says_what_disk_it_takes(hub: Hub, tmp_path: Path) -> None:
    folder = in_shards(tmp_path / "model")
    hub.storage.add_model("owner/large", folder)
    plan = api.plan("split-experts", "owner/large")
    sizes = [(folder / name).stat().st_size for name in shard_names(folder)]
    three = max(sum(sizes[n : n + 3]) for n in range(10))
    said = f"fetch   12 shards, {sum(sizes) / 1e6:.2f} MB from the Hub; at most {three / 1e6:.2f} MB of them lie beside"
    assert said in api.describe(plan)
    assert "fetch" not in api.describe(api.plan("split-experts", folder)).replace("fetched", "")


@pytest.mark.parametrize("ahead", [1, 4])
def test_the_plan_of_another_ahead_says_the_disk_of_that_run(hub: Hub, tmp_path: Path, ahead: int) -> None:
    folder = in_shards(tmp_path / "model")
    hub.storage.add_model("owner/large", folder)
    command = ["plan", "split-experts", "owner/large", "--ahead", str(ahead)]
    sizes = [(folder / name).stat().st_size for name in shard_names(folder)]
    most = max(sum(sizes[n : n + ahead + 1]) for n in range(12 - ahead))
    said = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)["streaming"]
    Draft202012Validator(SCHEMAS["plan"]["properties"]["streaming"]).validate(said)
    assert (said["spool_bytes"], said["ahead"], said["kept"]) == (most, ahead, False)
    text = CliRunner().invoke(main, command).stdout
    assert f"at most {most / 1e6:.2f} MB of them lie beside the output at once (ahead {ahead})" in text
    assert text.startswith(api.describe(api.plan("split-experts", "owner/large"), ahead=ahead).partition("\ndisk")[0])
    kept = CliRunner().invoke(main, [*command, "--keep-source"]).stdout
    assert f"fetch   12 shards, {sum(sizes) / 1e6:.2f} MB from the Hub (ahead {ahead}); they stay in the Hub's cache\n" in kept


def test_tensors_that_belong_together_may_lie_in_shards_far_apart(hub: Hub, tmp_path: Path) -> None:
    """Experts of a layer are stacked out of all shards: they stay until the last of them is there."""
    weights = tiny_moe(layers=12)
    experts = {f"experts.{n}.up_proj.weight": weights[f"model.layers.{n}.self_attn.q_proj.weight"] for n in range(12)}
    folder = write_checkpoint(tmp_path / "model", {**experts, "embed.weight": weights["lm_head.weight"]}, shards=6)
    hub.storage.add_model("owner/apart", folder)
    stack = ts.Stack(where=("experts.{index}.up_proj.weight",), into="experts.up_proj")
    convert(stack, folder, tmp_path / "local")
    with watched(tmp_path / "streamed") as seen:
        convert(stack, "owner/apart", tmp_path / "streamed", workers=3, ahead=1)
    assert contents(tmp_path / "streamed") == contents(tmp_path / "local")
    assert seen["shards"] <= 6
    fetched_once(hub, shard_names(folder))


def test_shards_of_which_nothing_is_kept_are_not_fetched(hub: Hub, tmp_path: Path) -> None:
    folder = in_shards(tmp_path / "model")
    hub.storage.add_model("owner/large", folder)
    convert(ts.Drop(where=("model.layers.{n}.{rest*}",)), "owner/large", tmp_path / "out")
    assert len(hub.fetched()) < 12


def test_the_source_may_be_kept(hub: Hub, tmp_path: Path) -> None:
    hub.storage.add_model("owner/tiny", FIXTURE)
    convert("split-experts", "owner/tiny", tmp_path / "out", keep_source=True)
    fetched_once(hub, shard_names(FIXTURE))
    plan = api.plan("quark-w8a8-int8", "owner/tiny")
    assert "nothing: every shard of the source is in the Hub's cache" in api.describe(plan)
    api.apply(plan, tmp_path / "again")
    fetched_once(hub, shard_names(FIXTURE))
    # Another program finds it there too.
    cached = Path(snapshot_download("owner/tiny"))
    fetched_once(hub, shard_names(FIXTURE))
    assert (cached / shard_names(FIXTURE)[0]).exists()


def test_what_the_cache_holds_is_read_there(hub: Hub, tmp_path: Path) -> None:
    hub.storage.add_model("owner/tiny", FIXTURE)
    first, *others = shard_names(FIXTURE)
    snapshot_download("owner/tiny", allow_patterns=[first])
    hub.requests.clear()
    convert("split-experts", "owner/tiny", tmp_path / "out")
    fetched_once(hub, others)
    assert next(Path(constants.HF_HUB_CACHE).rglob(first)).exists()


def test_a_cached_shard_that_is_damaged_is_named(hub: Hub, tmp_path: Path) -> None:
    hub.storage.add_model("owner/tiny", FIXTURE)
    cached = Path(snapshot_download("owner/tiny")) / shard_names(FIXTURE)[1]
    blob = cached.resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(SourceError, match=f"{cached.name}: the file in the cache is damaged.*remove {blob}"):
        convert("split-experts", "owner/tiny", tmp_path / "out")


@pytest.mark.parametrize(
    "fault",
    [{"status": 503}, {"status": 429, "headers": {"Retry-After": "3"}}, {"cut_after": 50_000}, {"flip": 70_000}],
    ids=["503", "429", "cut", "flipped"],
)
def test_faults_that_pass(hub: Hub, tmp_path: Path, waits: list[float], fault: dict) -> None:
    hub.storage.add_model("owner/tiny", FIXTURE)
    plan = api.plan("split-experts", "owner/tiny")
    convert("split-experts", FIXTURE, tmp_path / "local")
    hub.faults.add("GET /stored/", **fault)
    api.apply(plan, tmp_path / "out")
    assert hub.faults.happened
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"status": 403}, r"the token has no right to this \(403\)"),
        ({"status": 503}, r"the Hub is in trouble \(503\); try again later"),
        ({"cut_after": 5000}, "the Hub cannot be reached"),
        ({"flip": 70_000}, "what the Hub sends is not what it lists .*, twice; nothing of it was used"),
    ],
    ids=["403", "503", "cut", "flipped"],
)
def test_faults_that_stay_stop_the_run_and_it_goes_on_later(
    hub: Hub, tmp_path: Path, waits: list[float], fault: dict, message: str
) -> None:
    folder = in_shards(tmp_path / "model")
    repository = hub.storage.add_model("owner/large", folder)
    convert("split-experts", folder, tmp_path / "local")
    plan = api.plan("split-experts", "owner/large")
    bad = shard_names(folder)[6]
    hub.faults.add(f"GET /stored/{repository.files()[bad].sha256}", times=99, **fault)
    with pytest.raises(SourceError, match=f"owner/large/{bad}: {message}") as told:
        api.apply(plan, tmp_path / "out", workers=2)
    assert told.value.can_resume
    hub.faults.clear()
    before = hub.fetched()
    assert len(before) >= 6
    result = api.apply(plan, tmp_path / "out", workers=2, resume=True)
    assert result.resumed_units > 0
    assert contents(tmp_path / "out") == contents(tmp_path / "local")
    # Nothing that had come whole came again.
    assert {name: hub.fetched()[name] for name in before if name != bad} == {name: 1 for name in before if name != bad}


def test_a_file_that_became_another_stops_the_run(hub: Hub, tmp_path: Path, waits: list[float]) -> None:
    folder = in_shards(tmp_path / "model")
    repository = hub.storage.add_model("owner/large", folder)
    plan = api.plan("split-experts", "owner/large")
    other = bytearray((folder / shard_names(folder)[5]).read_bytes())
    other[-1] ^= 1
    commit = repository.commits[repository.refs["main"]]
    commit[shard_names(folder)[5]] = hub.storage.add_bytes(bytes(other), "x.safetensors")
    with pytest.raises(SourceError, match="what the Hub sends is not what it lists"):
        api.apply(plan, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_a_branch_that_moves_under_way_changes_nothing(hub: Hub, tmp_path: Path) -> None:
    folder = in_shards(tmp_path / "model")
    repository = hub.storage.add_model("owner/large", folder)
    plan = api.plan("split-experts", "owner/large")
    repository.commit(hub.storage.files_of(FIXTURE))
    api.apply(plan, tmp_path / "out")
    convert("split-experts", folder, tmp_path / "local")
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


def test_a_branch_that_moved_before_a_run_goes_on_is_told(hub: Hub, tmp_path: Path, waits: list[float]) -> None:
    folder = in_shards(tmp_path / "model")
    repository = hub.storage.add_model("owner/large", folder)
    first = repository.refs["main"]
    plan = api.plan("split-experts", "owner/large")
    hub.faults.add(f"GET /stored/{repository.files()[shard_names(folder)[6]].sha256}", times=99, status=403)
    with pytest.raises(SourceError):
        api.apply(plan, tmp_path / "out")
    hub.faults.clear()
    (folder / "README.md").write_text("better words")
    repository.commit(hub.storage.files_of(folder))
    with pytest.raises(JournalError, match=f"has moved on since this run was stopped; .*: owner/large@{first}"):
        convert("split-experts", "owner/large", tmp_path / "out", resume=True)
    convert("split-experts", f"owner/large@{first}", tmp_path / "out", resume=True)
    assert api.verify(tmp_path / "out", against=f"owner/large@{first}").is_sound


def test_a_disk_without_room_is_told_before_and_under_way(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = in_shards(tmp_path / "model")
    hub.storage.add_model("owner/large", folder)
    plan = api.plan("split-experts", "owner/large")
    from tensorsurgeon.running import target

    monkeypatch.setattr(target, "free_bytes", lambda _: plan.disk_bytes + (17 << 20))
    with pytest.raises(
        TargetError, match=r"the output needs .* GB and the shards that are fetched for it .* GB and the disk has"
    ):
        api.apply(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(SourceError, match=r"model-00001-of-00012.safetensors: has .* GB and the disk of .* GB free; make room"):
        api.apply(plan, tmp_path / "out")
    monkeypatch.undo()
    use(hub, tmp_path / "cache", monkeypatch)
    assert api.apply(plan, tmp_path / "out", resume=True).resumed_units == 0


def test_a_run_is_stopped_while_it_waits_for_a_shard(hub: Hub, tmp_path: Path) -> None:
    folder = in_shards(tmp_path / "model")
    hub.storage.add_model("owner/large", folder)
    plan = api.plan("split-experts", "owner/large")
    hub.seconds_per_mb = 1.0
    from tensorsurgeon.running.run import run_plan

    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    with pytest.raises(Interrupted, match="stopped while a shard was fetched; what is done is kept"):
        run_plan(plan, tmp_path / "out", stop=stop)
    hub.seconds_per_mb = 0
    run_plan(plan, tmp_path / "out", resume=True)
    convert("split-experts", folder, tmp_path / "local")
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


def test_stays() -> None:
    plain = Stays([{0}, {1}, {2}, {3}])
    assert [tuple(s) for s in plain.stays] == [(0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 3)]
    assert plain.peak_bytes([10, 20, 30, 40], ahead=2) == 90
    assert plain.peak_bytes([10, 20, 30, 40], ahead=1) == 70
    long = Stays([{0}, {1}, {0, 2}, {3}])
    assert (0, 0, 2) in [tuple(s) for s in long.stays]
    assert long.peak_bytes([10, 10, 10, 10], ahead=1) == 30
    assert not long.twice()
    again = Stays([{0}, {1}, {2}, {0, 3}], keep_steps=1)
    assert again.twice() == [0]
    assert again.fetched_bytes([10, 10, 10, 10]) == 50
    # Layers of which several lie in one shard: steps that fetch nothing do not count.
    layers = Stays([{0}, {0}, {0}, {0, 1}, {1}, {1}, {2}])
    assert [tuple(s) for s in layers.stays] == [(0, 0, 3), (1, 3, 5), (2, 6, 6)]
    assert layers.peak_bytes([1, 1, 1], ahead=2) == 3
    assert layers.peak_bytes([1, 1, 1], ahead=1) == 3
    assert Stays([{0}, {0}, {1}, {1}, {2}]).peak_bytes([1, 1, 1], ahead=1) == 2


def test_the_command_says_what_it_fetches(hub: Hub, tmp_path: Path) -> None:
    repository = hub.storage.add_model("owner/tiny", FIXTURE)
    options = ["--ahead", "3", "--keep-source"]
    done = CliRunner().invoke(main, ["apply", "split-experts", "owner/tiny", str(tmp_path / "out"), *options])
    assert done.exit_code == 0, done.output
    assert f"source  owner/tiny@{repository.refs['main']}\nfetch   4 shards, " in done.stderr
    assert "(ahead 3); they stay in the Hub's cache" in done.stderr
    done = CliRunner().invoke(main, ["apply", "split-experts", "owner/tiny", str(tmp_path / "again"), "--quiet"])
    assert done.exit_code == 0
    assert not done.stderr
    fetched_once(hub, shard_names(FIXTURE))
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_offline_a_whole_snapshot_is_converted(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.storage.add_model("owner/tiny", FIXTURE)
    snapshot_download("owner/tiny")
    hub.close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    convert("split-experts", "owner/tiny", tmp_path / "out")
    convert("split-experts", FIXTURE, tmp_path / "local")
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


def test_what_a_stopped_run_fetched_is_no_part_of_the_next(hub: Hub, tmp_path: Path) -> None:
    """Started over with another source, or from a folder, where nothing knows of a spool."""
    folder = in_shards(tmp_path / "model")
    repository = hub.storage.add_model("owner/large", folder)
    hub.storage.add_model("owner/tiny", FIXTURE)
    plan = api.plan("split-experts", "owner/large")
    stale = repository.files()[shard_names(folder)[6]].sha256
    for source in ("owner/tiny", FIXTURE):
        hub.faults.add(f"GET /stored/{stale}", times=99, status=403)
        with pytest.raises(SourceError):
            api.apply(plan, tmp_path / "out", overwrite=(tmp_path / "out").exists())
        hub.faults.clear()
        spool = tmp_path / "out" / ".surgeon" / "spool"
        (spool / "model-00001-of-00004.safetensors").write_bytes(b"of another model")
        (spool / ".cache" / "huggingface" / "download").mkdir(parents=True, exist_ok=True)
        (spool / ".cache" / "huggingface" / "download" / "x.incomplete").write_bytes(b"half")
        convert("split-experts", source, tmp_path / "out", overwrite=True)
        assert not (tmp_path / "out" / ".surgeon").exists()
        assert api.verify(tmp_path / "out", against=FIXTURE).is_sound


def test_of_a_run_that_stopped_what_was_not_read_stays(hub: Hub, tmp_path: Path) -> None:
    folder = in_shards(tmp_path / "model")
    repository = hub.storage.add_model("owner/large", folder)
    plan = api.plan("split-experts", "owner/large")
    hub.faults.add(f"GET /stored/{repository.files()[shard_names(folder)[6]].sha256}", times=99, status=403)
    with pytest.raises(SourceError):
        api.apply(plan, tmp_path / "out")
    # What was fetched and not read lies there; of what was read nothing does.
    left = {p.name for p in (tmp_path / "out" / ".surgeon" / "spool").glob("*.safetensors")}
    assert len(left) <= 3
    assert not list((tmp_path / "out" / ".surgeon" / "spool").rglob("*.incomplete"))
