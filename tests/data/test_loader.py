import contextlib
import itertools
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.energon import SkipSample

from mmcore.data.batch import Batch
from mmcore.data.image import decode_image, preprocess
from mmcore.data.loader import FEW_SKIPPED, Loader
from mmcore.data.task_encoder import MAX_SKIPPED_IN_A_ROW, Layout, RawSample, TaskEncoder
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


@pytest.mark.parametrize(
    ("num_workers", "packing", "micro_batch_size"), [(0, 0, 3), (2, 0, 3), (0, 12, 1), (0, 5, 2), (2, 12, 1)]
)
def test_resume_goes_on_with_the_same_batches(
    flawed: Path, tokenizer: Tokenizer, num_workers: int, packing: int, micro_batch_size: int
) -> None:
    def fresh() -> Loader:
        data = {"num_workers": num_workers, "packing_buffer_size": packing}
        return loader(flawed, tokenizer, data=data, micro_batch_size=micro_batch_size)

    stream = fresh()
    assert stream.skipped == 0
    iterator, states, batches, skipped = iter(stream), {0: stream.state_dict()}, [], [0]
    for position in range(1, 32):
        batches.append(next(iterator))
        skipped.append(stream.skipped)
        if position in (1, 20):
            states[position] = stream.state_dict()
    for position in states:
        resumed = fresh()
        resumed.load_state_dict(states[position])
        assert resumed.skipped == skipped[position]
        again = iter(resumed)
        assert same([next(again) for _ in range(6)], batches[position : position + 6])
        assert resumed.skipped == skipped[position + 6]
        twice = fresh()  # a state that a resumed loader saved
        twice.load_state_dict(resumed.state_dict())
        assert same(take(twice, 5), batches[position + 6 : position + 11])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_packed_rows_hold_every_sample_once(dataset: Path, tokenizer: Tokenizer, num_workers: int) -> None:
    """An epoch in the order of the shards; rows are as long as seq_length allows."""
    data = {"num_workers": num_workers, "shuffle_buffer_size": 0, "packing_buffer_size": 15, "seq_length": 64}
    stream = iter(loader(dataset, tokenizer, data=data, micro_batch_size=1))
    seen: Counter[str] = Counter()
    rows = []
    while seen.total() < NUM_SAMPLES:
        rows.append(next(stream))
        seen.update(rows[-1].keys)
    assert all(row.tokens.shape[1] <= 64 for row in rows)
    assert sum(row.tokens.shape[1] for row in rows) / (64 * len(rows)) > 0.75
    if not num_workers:  # workers end their epochs at different rows
        assert set(seen.values()) == {1}
    (pair,) = take(loader(dataset, tokenizer, data=data, micro_batch_size=2), 1)
    if not num_workers:
        assert pair.keys == rows[0].keys + rows[1].keys and len(pair.cu_seqlens) == len(pair.keys) + 1


def test_broken_pictures_leave_their_rows(flawed: Path, tokenizer: Tokenizer) -> None:
    data = {"packing_buffer_size": 10, "shuffle_buffer_size": 0}
    stream = loader(flawed, tokenizer, data=data, micro_batch_size=1)
    seen: Counter[str] = Counter()
    for row in stream:
        seen.update(row.keys)
        if seen.total() >= 37:
            break
    assert len(seen) == 37 and set(seen.values()) == {1} and stream.skipped == 3


@pytest.mark.parametrize(("num_workers", "data_parallel_size"), [(0, 1), (0, 3), (2, 1), (2, 2)])
def test_ranks_and_workers_share_an_epoch(
    dataset: Path, tokenizer: Tokenizer, num_workers: int, data_parallel_size: int
) -> None:
    readers = data_parallel_size * max(1, num_workers)
    share = NUM_SAMPLES // readers
    seen: Counter[str] = Counter()
    for rank in range(data_parallel_size):
        stream = loader(
            dataset,
            tokenizer,
            data={"num_workers": num_workers, "shuffle_buffer_size": 0},
            micro_batch_size=1,
            data_parallel_rank=rank,
            data_parallel_size=data_parallel_size,
        )
        # Workers take turns, so that the first `share` rounds are their first epochs.
        seen.update(keys(take(stream, share * max(1, num_workers))))
    assert set(seen.values()) == {1} and len(seen) == share * readers


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
    data = {"num_workers": num_workers, "shuffle_buffer_size": 0}
    stream = loader(flawed, tokenizer, data=data, micro_batch_size=1)
    seen = keys(take(stream, 36))
    assert not {"00000003", "00000017", "00000031"} & set(seen)
    assert 1 <= stream.skipped <= 3
    error = capfd.readouterr().err
    assert "skipped: a broken PNG picture (image file is truncated)" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_broken_samples_stop_the_run(flawed: Path, tokenizer: Tokenizer, num_workers: int) -> None:
    stream = loader(flawed, tokenizer, data={"num_workers": num_workers})
    with pytest.raises(RuntimeError, match=r"samples had to be skipped, more than 1%"):
        take(stream, 1000)
    assert stream.skipped > FEW_SKIPPED


def test_nothing_but_broken_samples_stops_the_run(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_shards(tmp_path / "broken", 5, broken=frozenset(range(5)))
    with pytest.raises(RuntimeError, match=f"{MAX_SKIPPED_IN_A_ROW} samples in a row cannot be used"):
        take(loader(path, tokenizer), 1)


def test_in_a_row_means_nothing_good_between(tokenizer: Tokenizer) -> None:
    """A packing buffer lays many samples out before it looks at the first picture."""
    layout = Layout(
        tokenizer=tokenizer,
        conversation="plain",
        num_image_embeddings=4,
        image_token_id=tokenizer.vocab_size,
        image_size=16,
        seq_length=64,
    )
    encoder = TaskEncoder(layout)
    good = {"json": json.dumps({"conversations": conversation("what", "one")}).encode()}
    for number in range(2 * MAX_SKIPPED_IN_A_ROW):
        sample = RawSample(__key__=str(number), __restore_key__=(), __subflavors__={}, parts=good if number % 2 else {})
        with contextlib.nullcontext() if number % 2 else pytest.raises(SkipSample):
            encoder.preencode_sample(sample)
    assert encoder.skipped == MAX_SKIPPED_IN_A_ROW


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
        ({"data": {"num_workers": 1}}, "num_workers was 0 and is 1"),
        ({"data": {"shuffle_buffer_size": 5}}, "shuffle_buffer_size was 16 and is 5"),
        ({"micro_batch_size": 2}, "micro_batch_size was 4 and is 2"),
        ({"seed": 8}, "seed was 7 and is 8"),
        ({"data_parallel_size": 2}, "data_parallel_size was 1 and is 2"),
        ({"data_parallel_size": 2, "data_parallel_rank": 1}, "data_parallel_rank was 0 and is 1; data_parallel_size"),
    ],
)
def test_a_state_of_another_setup_is_refused(dataset: Path, tokenizer: Tokenizer, change: dict, message: str) -> None:
    stream = loader(dataset, tokenizer)
    take(stream, 3)
    state = stream.state_dict()
    with pytest.raises(ValueError, match=message):
        loader(dataset, tokenizer, **change).load_state_dict(state)


def test_a_state_of_another_dataset_is_refused(dataset: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    state = loader(dataset, tokenizer).state_dict()
    moved = shutil.copytree(dataset, tmp_path / "moved")
    loader(moved, tokenizer).load_state_dict(state)
    other = write_shards(tmp_path / "other", NUM_SAMPLES, broken=frozenset({1}))
    with pytest.raises(ValueError, match=r"dataset was '[0-9a-f]+' and is '[0-9a-f]+'"):
        loader(other, tokenizer).load_state_dict(state)


@pytest.mark.parametrize(
    "state", [b"", b"not json", b"[]", b"{}", b'{"fingerprint": {}, "state": ["os", {}]}', b"\x80\x04."]
)
def test_a_broken_state_is_refused(dataset: Path, tokenizer: Tokenizer, state: bytes) -> None:
    with pytest.raises(ValueError, match="loader's state cannot be read"):
        loader(dataset, tokenizer).load_state_dict(state)


def test_what_does_not_go_together_is_refused(dataset: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    vocab_size = tokenizer.vocab_size
    changes: list[tuple[dict[str, Any], str]] = [
        ({"image_token_id": vocab_size - 1}, f"image_token_id {vocab_size - 1} is a token of .* has {vocab_size}"),
        ({"data": {"seq_length": NUM_IMAGE_EMBEDDINGS}}, "no room for a picture"),
        ({"conversation": "mistral"}, "did you mean 'mistral_instruct'"),
        ({"data": {"path": str(tmp_path / "nowhere")}}, "nowhere does not exist"),
        ({"data": {"path": str(tmp_path)}}, "is no energon dataset"),
        ({"data_parallel_size": 100}, "90 samples for 100 readers"),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            loader(dataset, tokenizer, **change)


def test_the_image_token_may_be_a_control_token(dataset: Path, tokenizer: Tokenizer) -> None:
    """As in models that came from transformers, whose placeholder has a row in the embedding."""
    loader(dataset, tokenizer, image_token_id=tokenizer.special("[INST]"))


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


def test_a_metadataset_is_opened_too(dataset: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "blend.yaml"
    path.write_text(f"__module__: megatron.energon\n__class__: MetadatasetV2\nsplits: {{train: {{path: {dataset}}}}}\n")
    assert same(take(loader(path, tokenizer), 5), take(loader(dataset, tokenizer), 5))


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
