import io
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from megatron.energon.epathlib import EPath

from mmcore.data.batch import Batch
from mmcore.data.image import decode_image, preprocess
from mmcore.data.loader import Loader
from mmcore.data.stream import TooManySkippedError
from mmcore.data.tokenizer import Tokenizer
from tests.data import fabricated
from tests.data.fabricated import NUM_IMAGE_EMBEDDINGS, conversation, loader, picture, write_shards

NUM_SAMPLES = 90


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return fabricated.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "dataset", NUM_SAMPLES)


@pytest.fixture(scope="module")
def flawed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "flawed", 40, broken=frozenset({3, 17, 31}))


def test_the_val_split_is_the_same_for_any_workers_and_ranks(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Or losses on it could not be compared after a run goes on elsewhere."""
    path = write_shards(tmp_path / "val", 20, split="val")
    seen = []
    for size, workers in ((1, 0), (1, 3), (4, 1)):
        parts = [
            loader(path, tokenizer, data={"num_workers": workers}, split="val", data_parallel_rank=rank,
                   data_parallel_size=size)
            for rank in range(size)
        ]  # fmt: skip
        taken = [take(part, 8 // size) for part in parts]
        for part in parts:
            part.close()
        seen.append([batch.keys for step in zip(*taken, strict=True) for batch in step])
    assert seen[0] == seen[1] == seen[2]


def take(stream: Loader, count: int) -> list[Batch]:
    return list(itertools.islice(stream, count))


def same(left: list[Batch], right: list[Batch]) -> bool:
    tensors = ("tokens", "labels", "loss_mask", "loss_positions", "images", "cu_seqlens")
    return len(left) == len(right) and all(
        one.keys == other.keys and all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors)
        for one, other in zip(left, right, strict=True)
    )


def keys(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def test_a_batch_is_what_the_shard_holds(dataset: Path, tokenizer: Tokenizer) -> None:
    for batch in take(loader(dataset, tokenizer), 10):
        assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == (1, int(batch.cu_seqlens[-1]))
        assert batch.cu_seqlens.dtype == torch.int32 and batch.max_seqlen == int(batch.cu_seqlens.diff().max())
        assert batch.tokens.dtype == batch.labels.dtype == torch.int64
        assert batch.images.shape == (4, 3, 16, 16) and batch.images.dtype == torch.uint8
        assert (batch.tokens == tokenizer.vocab_size).sum().item() == 4 * NUM_IMAGE_EMBEDDINGS
        for row, key in enumerate(batch.keys):
            number = int(key)
            assert torch.equal(batch.images[row], preprocess(decode_image(picture(number)), 16))
            answer = tokenizer.encode((f"it is number {number} " + "one " * (number % 5)).rstrip(" "))
            place = slice(*batch.cu_seqlens[row : row + 2].tolist())
            assert batch.tokens[0, place][0] == tokenizer.bos_id
            assert batch.labels[0, place][batch.loss_mask[0, place] > 0].tolist() == [*answer, tokenizer.eos_id]


@dataclass(frozen=True)
class Setup:
    """A way to read: what decides the batches, and how many ranks read them."""

    data: dict[str, Any]
    micro_batch_size: int = 1
    path: Path | None = None

    def ranks(self, tokenizer: Tokenizer, size: int, states: Sequence[bytes] = (), **data: Any) -> list[Loader]:
        assert self.path is not None
        return [
            loader(
                self.path,
                tokenizer,
                data={**self.data, **data},
                micro_batch_size=self.micro_batch_size,
                data_parallel_rank=rank,
                data_parallel_size=size,
                states=states,
            )
            for rank in range(size)
        ]


PACKED = {"packing_buffer_size": 12, "num_streams": 8}


@pytest.mark.parametrize("num_workers", [0, 2, 4])
@pytest.mark.parametrize("packing", [0, 12])
def test_resume_goes_on_with_the_same_batches(
    flawed: Path, tokenizer: Tokenizer, num_workers: int, packing: int
) -> None:
    """Whatever the number of workers, before and after."""
    setup = Setup({"packing_buffer_size": packing, "num_streams": 4, "max_skipped": 1}, 2, flawed)

    (stream,) = setup.ranks(tokenizer, 1)
    iterator, states, batches, counts = iter(stream), {0: stream.state_dict()}, [], [stream.counts()]
    for position in range(1, 40):
        batches.append(next(iterator))
        counts.append(stream.counts())
        if position in (1, 22):
            states[position] = stream.state_dict()
    for position, state in states.items():
        (resumed,) = setup.ranks(tokenizer, 1, [state], num_workers=num_workers)
        assert resumed.counts() == counts[position]
        again = iter(resumed)
        assert same([next(again) for _ in range(9)], batches[position : position + 9])
        assert resumed.counts() == counts[position + 9]
        (twice,) = setup.ranks(tokenizer, 1, [resumed.state_dict()])  # a state that a resumed loader saved
        assert same(take(twice, 8), batches[position + 9 : position + 17])
        resumed.close()
    assert stream.skipped > 0


@pytest.mark.parametrize("blend", ["", "blend", "blend_epochized"])
@pytest.mark.parametrize("packing", [0, 12])
def test_a_ledger_of_fifty_kills(
    dataset: Path, flawed: Path, tokenizer: Tokenizer, tmp_path: Path, blend: str, packing: int
) -> None:
    """Killed at random and started again on other numbers of ranks, a run trains on what it would have without."""
    path = dataset
    if blend:
        parts = [{"path": str(dataset)}, {"path": str(flawed)}]
        numbers = {"blend": ("weight", 3, 1), "blend_epochized": ("repetitions", 1, 2)}[blend]
        for part, number in zip(parts, numbers[1:], strict=True):
            part[numbers[0]] = number
        path = metadataset(tmp_path, {blend: parts})
    setup = Setup({"packing_buffer_size": packing, "num_streams": 4, "max_skipped": 1}, 1, path)
    chance, ledger, states = random.Random(0), [], []
    for kill in range(51):
        size = chance.choice([1, 2, 4]) if 0 < kill < 50 else 1
        ranks = setup.ranks(tokenizer, size, states, num_workers=chance.choice([0, 0, 0, 2]))
        readers, trained = [iter(rank) for rank in ranks], []
        for _ in range(chance.randint(1, 3)):  # as many steps of four batches as it gets before it is killed
            rounds = [[next(reader).keys for reader in readers] for _ in range(4 // size)]
            trained.append([keys for batches in rounds for keys in batches])
            if chance.random() < 0.6:  # a checkpoint
                ledger += trained
                trained, states = [], [rank.state_dict() for rank in ranks]
        for rank in ranks:
            rank.close()
    (whole,) = setup.ranks(tokenizer, 1)
    reader = iter(whole)
    assert len(ledger) > 40 and ledger == [[next(reader).keys for _ in range(4)] for _ in ledger]


@pytest.mark.parametrize(("num_workers", "data_parallel_size"), [(0, 1), (0, 4), (2, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("packing", [0, 12])
def test_an_epoch_holds_every_sample_once(
    dataset: Path, tokenizer: Tokenizer, num_workers: int, data_parallel_size: int, packing: int
) -> None:
    """To the sample: of each stream those of its first epoch, of all streams one of each."""
    setup = Setup({"num_workers": num_workers, "num_streams": 4, "packing_buffer_size": packing}, 1, dataset)
    seen: Counter[str] = Counter()
    for rank in setup.ranks(tokenizer, data_parallel_size):
        share = {stream: NUM_SAMPLES * (stream + 1) // 4 - NUM_SAMPLES * stream // 4 for stream in rank._streams}
        for turn, batch in enumerate(rank):
            stream = rank._streams[turn % len(rank._streams)]
            if share[stream]:
                share[stream] -= len(batch.keys)
                seen.update(batch.keys)
            if not any(share.values()):
                break
        rank.close()
    assert len(seen) == NUM_SAMPLES and set(seen.values()) == {1}


def test_packed_rows_are_full(dataset: Path, tokenizer: Tokenizer) -> None:
    data = {"shuffle_buffer_size": 0, "packing_buffer_size": 15, "num_streams": 1}
    rows = take(loader(dataset, tokenizer, data=data, micro_batch_size=1), 30)
    assert all(row.tokens.shape[1] <= 64 for row in rows)
    assert sum(row.tokens.shape[1] for row in rows) / (64 * len(rows)) > 0.75
    (pair,) = take(loader(dataset, tokenizer, data=data, micro_batch_size=2), 1)
    assert pair.keys == rows[0].keys + rows[1].keys and len(pair.cu_seqlens) == len(pair.keys) + 1


def test_broken_pictures_leave_their_rows(flawed: Path, tokenizer: Tokenizer) -> None:
    data = {"packing_buffer_size": 10, "num_streams": 1}
    stream = loader(flawed, tokenizer, data=data, micro_batch_size=1)
    seen: Counter[str] = Counter()
    for row in stream:
        seen.update(row.keys)
        if seen.total() >= 37:
            break
    assert len(seen) == 37 and set(seen.values()) == {1} and stream.skipped == 3


def test_order_depends_on_the_seed_alone(dataset: Path, tokenizer: Tokenizer) -> None:
    torch.manual_seed(1)
    first = take(loader(dataset, tokenizer), 30)
    torch.manual_seed(2)
    assert same(first, take(loader(dataset, tokenizer), 30))
    assert keys(first) != keys(take(loader(dataset, tokenizer, seed=8), 30))
    assert keys(first) != sorted(keys(first))


def test_a_dataset_below_one_batch_repeats(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_shards(tmp_path / "small", 3)
    for size in (0, 1000):
        seen = Counter(keys(take(loader(path, tokenizer, data={"shuffle_buffer_size": size}, micro_batch_size=5), 12)))
        assert len(seen) == 3 and seen.total() == 60


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_samples_are_skipped_and_counted(
    flawed: Path, tokenizer: Tokenizer, num_workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    data = {"num_workers": num_workers, "num_streams": 2}
    stream = loader(flawed, tokenizer, data=data, micro_batch_size=1)
    seen = keys(take(stream, 36))
    assert not {"00000003", "00000017", "00000031"} & set(seen)
    assert 1 <= stream.skipped <= 3
    assert stream.counts()["flawed"].samples == 36 and stream.counts()["flawed"].skipped == stream.skipped
    stream.close()
    error = capfd.readouterr().err
    assert re.search(
        r"mmcore: skipped: flawed, train_00000[01]\.tar, sample 000000(03|17|31): a broken PNG picture", error
    )
    assert "Traceback" not in error


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_broken_samples_stop_the_run(flawed: Path, tokenizer: Tokenizer, num_workers: int) -> None:
    stream = loader(flawed, tokenizer, data={"num_workers": num_workers, "num_streams": 2})
    message = (
        r"^11 of 1000 samples in a row of flawed cannot be used, and --data.max-skipped allows 1.0%; the last is "
        r"flawed, train_00000[01].tar, sample 000000\d\d: a broken PNG"
    )
    with pytest.raises(TooManySkippedError, match=message):
        take(stream, 1000)


def test_how_many_may_be_skipped(flawed: Path, tokenizer: Tokenizer) -> None:
    take(loader(flawed, tokenizer, data={"max_skipped": 0.1}), 300)
    with pytest.raises(TooManySkippedError, match=r"^1 of 1000 samples"):
        take(loader(flawed, tokenizer, data={"max_skipped": 0}), 100)


def test_nothing_but_broken_samples_stops_the_run(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_shards(tmp_path / "broken", 5, broken=frozenset(range(5)))
    with pytest.raises(TooManySkippedError, match=r"^1000 of 1000 samples in a row"):
        take(loader(path, tokenizer, data={"max_skipped": 1.0}), 1)


def test_skips_are_counted_by_source(dataset: Path, flawed: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = metadataset(tmp_path, {"blend": [{"path": str(dataset), "weight": 4}, {"path": str(flawed), "weight": 1}]})
    stream = loader(path, tokenizer, data={"max_skipped": 0.5})
    batches = take(stream, 100)
    counts = stream.counts()
    assert list(counts) == ["dataset", "flawed"] and counts["dataset"].skipped == 0 < counts["flawed"].skipped
    assert [count.samples for count in counts.values()] == [
        sum(int((batch.sources == source).sum()) for batch in batches) for source in (0, 1)
    ]
    assert counts["dataset"].samples == pytest.approx(320, abs=30)


def test_a_damaged_shard_costs_its_samples(dataset: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """What happens to it after the run has begun; at the start it is refused."""
    copy = shutil.copytree(dataset, tmp_path / "copy")
    stream = loader(copy, tokenizer, data={"max_skipped": 1, "num_streams": 1}, micro_batch_size=1)
    shard = copy / "train_000002.tar"
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 2)
    (copy / "train_000003.tar").unlink()
    seen = set(keys(take(stream, 200)))
    assert {f"{number:08d}" for number in (*range(40), *range(80, 90))} <= seen
    assert not {f"{number:08d}" for number in range(60, 80)} & seen and 3 < len(seen) - 50 < 17


def test_shards_of_others(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """As webdataset writes them, with names too long for ustar, and prepared by energon."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(4):
            text = json.dumps({"conversations": conversation("<image>what", "one")}).encode()
            for extension, data in (("png", picture(number)), ("json", text)):
                member = tarfile.TarInfo(f"{'long' * 40}/{number}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    from megatron.energon.flavors import BaseWebdatasetFactory

    BaseWebdatasetFactory.prepare_dataset(folder, ["a.tar"], split_parts_ratio=[("train", 1.0)], workers=1)
    (folder / ".nv-meta" / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")
    assert set(keys(take(loader(folder, tokenizer, micro_batch_size=4), 1))) == {
        f"{'long' * 40}/{number}" for number in range(4)
    }


def test_cut_samples_are_counted(dataset: Path, tokenizer: Tokenizer) -> None:
    full = keys(take(loader(dataset, tokenizer), 20))
    long = loader(dataset, tokenizer, data={"seq_length": 25})
    batches = take(long, 20)
    assert keys(batches) == full and max(batch.max_seqlen for batch in batches) == 25
    assert 0 < long.cut < 80 and long.skipped == 0


def test_text_and_several_rounds(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from mmcore.data.shards import ShardWriter

    with ShardWriter(tmp_path / "out") as writer:
        text = json.dumps({"id": "a", "conversations": conversation("what", "one", "is it", "two")}).encode()
        writer.write("train", "0", {"json": text})
    (batch,) = take(loader(tmp_path / "out", tokenizer, micro_batch_size=2), 1)
    assert batch.images.shape == (0, 3, 16, 16)
    answers = [*tokenizer.encode("one"), tokenizer.eos_id, *tokenizer.encode("two"), tokenizer.eos_id]
    assert batch.labels[0, batch.loss_positions].tolist() == 2 * answers  # the one sample, twice


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"shuffle_buffer_size": 5}}, "shuffle_buffer_size was 16 and is 5"),
        ({"data": {"packing_buffer_size": 9}}, "packing_buffer_size was 0 and is 9"),
        ({"data": {"num_streams": 4}}, "num_streams was 2 and is 4"),
        ({"data": {"seq_length": 60}}, "seq_length was 64 and is 60"),
        ({"micro_batch_size": 2}, "micro_batch_size was 4 and is 2"),
        ({"seed": 8}, "seed was 7 and is 8"),
        ({"data_parallel_size": 3}, "dealt to 2 streams, which 3 data parallel ranks .* start 1, 2 of them"),
    ],
)
def test_a_state_of_another_setup_is_refused(dataset: Path, tokenizer: Tokenizer, change: dict, message: str) -> None:
    stream = loader(dataset, tokenizer, data={"num_streams": 2})
    take(stream, 3)
    with pytest.raises(ValueError, match=message):
        loader(dataset, tokenizer, states=[stream.state_dict()], **change)


def test_a_state_of_another_dataset_is_refused(dataset: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    state = loader(dataset, tokenizer).state_dict()
    moved = shutil.copytree(dataset, tmp_path / "moved")
    loader(moved, tokenizer, states=[state])
    other = write_shards(tmp_path / "other", NUM_SAMPLES, broken=frozenset({1}))
    with pytest.raises(ValueError, match=r"dataset was '[0-9a-f]+' and is '[0-9a-f]+'"):
        loader(other, tokenizer, states=[state])


@pytest.mark.parametrize("state", [b"", b"not json", b"[]", b"{}", b'{"fingerprint": {}, "position": 1}', b"\x80\x04."])
def test_a_broken_state_is_refused(dataset: Path, tokenizer: Tokenizer, state: bytes) -> None:
    with pytest.raises(ValueError, match="loader's state cannot be read"):
        loader(dataset, tokenizer, states=[state])


def test_states_must_be_of_all_ranks_at_one_step(dataset: Path, tokenizer: Tokenizer) -> None:
    ranks = Setup({"num_streams": 2}, 1, dataset).ranks(tokenizer, 2)
    take(ranks[0], 1)
    for states in ([ranks[1].state_dict()], [rank.state_dict() for rank in ranks]):
        with pytest.raises(ValueError, match="not those of all ranks at one step"):
            loader(dataset, tokenizer, states=states)


def test_what_does_not_go_together_is_refused(dataset: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    vocab_size = tokenizer.vocab_size
    changes: list[tuple[dict[str, Any], str]] = [
        (
            {"pictures": fabricated.pictures(vocab_size - 1)},
            f"image_token_id {vocab_size - 1} is a token of .* has {vocab_size}",
        ),
        ({"data": {"seq_length": NUM_IMAGE_EMBEDDINGS}}, "no room for a picture"),
        ({"conversation": "mistral"}, "did you mean 'mistral_instruct'"),
        ({"data": {"path": str(tmp_path / "nowhere")}}, "nowhere does not exist"),
        ({"data": {"path": str(tmp_path)}}, "is no energon dataset"),
        ({"data": {"path": "s3://bucket/data"}}, "s3://bucket/data: object stores are read as msc://PROFILE/PATH"),
        ({"data_parallel_size": 100}, "90 samples for 100 streams"),
        ({"data": {"num_streams": 6}, "data_parallel_size": 4}, "6 streams, which 4 .* start 1, 2, 3, 6 of them"),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            loader(dataset, tokenizer, **change)


def test_the_image_token_may_be_a_control_token(dataset: Path, tokenizer: Tokenizer) -> None:
    """As in models that came from transformers, whose placeholder has a row in the embedding."""
    image_token_id = tokenizer.special("[INST]")
    loader(dataset, tokenizer, conversation="plain", pictures=fabricated.pictures(image_token_id))


def test_missing_and_broken_files_are_named(dataset: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name, message in [
        ("train_000001.tar", "train_000001.tar is missing"),
        ("train_000002.tar.idx", "train_000002.tar.idx is missing"),
        (".nv-meta/split.yaml", "no readable energon dataset"),
    ]:
        copy = shutil.copytree(dataset, tmp_path / message.replace(" ", "_"))
        (copy / name).unlink()
        with pytest.raises(ValueError, match=message):
            loader(copy, tokenizer)


def metadataset(folder: Path, split: dict[str, Any]) -> Path:
    path = folder / "blend.yaml"
    content = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": {"train": split}}
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_metadataset_is_opened_too(dataset: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = metadataset(tmp_path, {"path": str(dataset)})
    assert same(take(loader(path, tokenizer), 5), take(loader(dataset, tokenizer), 5))
    path = metadataset(tmp_path, {"path": str(dataset), "subset": {"range": [30, 40]}})
    assert set(keys(take(loader(path, tokenizer), 5))) == {f"{number:08d}" for number in range(30, 40)}


def test_a_blend_by_epochs(dataset: Path, flawed: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    parts = [{"repetitions": 2, "path": str(flawed)}, {"repetitions": 0.5, "path": str(dataset)}]
    stream = iter(
        loader(
            metadataset(tmp_path, {"blend_epochized": parts}),
            tokenizer,
            data={"max_skipped": 1, "num_streams": 1},
            micro_batch_size=1,
        )
    )
    halves = []
    for _ in range(2):
        batches = [next(stream) for _ in range(2 * 37 + 45)]
        seen = Counter((int(batch.sources), batch.keys[0]) for batch in batches)
        assert sum(seen[0, f"{number:08d}"] == 2 for number in range(40)) == 37
        halves.append({key for source, key in seen if source == 1})
    assert [len(half) for half in halves] == [45, 45] and len(halves[0] | halves[1]) == 90


def test_what_energon_does_and_this_does_not_is_refused(dataset: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    joined = metadataset(tmp_path, {"path": str(dataset), "aux": {"more": f"filesystem://{dataset}"}})
    with pytest.raises(ValueError, match="asks for a join, for auxiliary files"):
        loader(joined, tokenizer)


@pytest.mark.parametrize("is_local", [True, False])
def test_an_object_store(
    dataset: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_local: bool
) -> None:
    """Through energon's multi-storage-client: a profile that stands for a folder, read as a folder and as a store."""
    provider = {"type": "file", "options": {"base_path": str(dataset.parent)}}
    (tmp_path / "msc.yaml").write_text(yaml.safe_dump({"profiles": {"disk": {"storage_provider": provider}}}))
    monkeypatch.setenv("MSC_CONFIG", str(tmp_path / "msc.yaml"))
    expected = take(loader(dataset, tokenizer), 10)
    if not is_local:
        monkeypatch.setattr(EPath, "is_local", lambda self: False)
    for num_workers in (0, 2):
        stream = loader(f"msc://disk/{dataset.name}", tokenizer, data={"num_workers": num_workers, "num_streams": 1})
        assert same(take(stream, 10), expected)
        stream.close()
    with pytest.raises(ValueError, match="no readable energon dataset"):
        loader("msc://disk/nothing", tokenizer)


def test_loading_says_nothing(dataset: Path, tmp_path: Path) -> None:
    """In a process of its own, with warnings as a user sees them."""
    code = (
        "import sys; from pathlib import Path; from tests.data.fabricated import loader, tokenizer; import itertools\n"
        "for workers in (0, 1):\n"
        "    stream = loader(Path(sys.argv[1]), tokenizer(Path(sys.argv[2])), data={'num_workers': workers})\n"
        "    assert len(list(itertools.islice(stream, 30))) == 30\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(dataset), str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
